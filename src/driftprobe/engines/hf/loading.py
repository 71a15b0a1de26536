"""Loads a local model folder: checks first, in our words, then transformers does the work. Never pickle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from driftprobe.engines.base import BUILTIN
from driftprobe.errors import ModelError, UsageError

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ATTENTION = ("eager", "sdpa")


def load(model: str, *, dtype: str, attn: str | None) -> tuple[Any, Any]:
    """Return (model, tokenizer or None) of a local folder, in a dtype, with an attention kernel.

    Raises ModelError where the folder, its weights or its configuration cannot be used, UsageError for an unknown
    dtype or kernel.
    """
    if dtype not in DTYPES:
        raise _unknown("dtype", "--dtype", dtype, tuple(DTYPES))
    if attn is not None and attn not in ATTENTION:
        raise _unknown("attention kernel", "--attn", attn, ATTENTION)
    folder = _folder(model)
    with _quiet():
        return _load_model(folder, DTYPES[dtype], attn), _load_tokenizer(folder)


def _unknown(what: str, where: str, measured: str, allowed: tuple[str, ...]) -> UsageError:
    return UsageError(
        f"unknown {what}", where=where, measured=measured, allowed=", ".join(allowed), next_step="choose one of them"
    )


def _folder(model: str) -> Path:
    folder = BUILTIN.get(model, Path(model).expanduser())
    if not folder.is_dir():
        raise ModelError(
            "no such model folder", where="--model", measured=model,
            allowed="a local folder with config.json and *.safetensors, or builtin:tiny",
            next_step="check the path; a model of a hub must be downloaded to a folder first",
        )  # fmt: skip
    if not (folder / "config.json").is_file():
        raise ModelError(
            "not a model folder", where=str(folder), measured="no config.json",
            allowed="config.json and *.safetensors", next_step="point --model at the folder that holds config.json",
        )  # fmt: skip
    if not any(folder.glob("*.safetensors")):
        others = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "none"
        raise ModelError(
            "no weights in the model folder", where=str(folder), measured=f"no *.safetensors (pickled files: {others})",
            allowed="weights in safetensors; pickled weights are never loaded",
            next_step="save the model with save_pretrained(folder, safe_serialization=True)",
        )  # fmt: skip
    return folder


def _load_model(folder: Path, dtype: torch.dtype, attn: str | None) -> Any:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    arguments: dict[str, Any] = {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}
    if attn is not None:
        arguments["attn_implementation"] = attn
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **arguments
        )
    except Exception as error:  # whatever a stranger's folder makes transformers raise becomes one message
        raise ModelError(
            "the model folder cannot be loaded", where=str(folder), measured=f"{type(error).__name__}: {error}"[:400],
            allowed="a causal language model that this transformers version knows",
            next_step="load it with AutoModelForCausalLM.from_pretrained alone; upgrade transformers if it is newer",
        ) from error  # fmt: skip
    missing = sorted(report.get("missing_keys", []))
    if missing:
        raise ModelError(
            "weights are missing", where=str(folder), measured=f"{len(missing)} tensors, first {missing[0]}",
            allowed="every tensor of the architecture", next_step="copy the whole checkpoint, every shard of it",
        )  # fmt: skip
    return model.eval()


def _load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer, or None where the folder has none (token ids can still be given)."""
    import transformers

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # as above: one message for whatever the files make it raise
        raise ModelError(
            "the tokenizer cannot be loaded", where=str(folder), measured=f"{type(error).__name__}: {error}"[:400],
            allowed="tokenizer files that this transformers version knows",
            next_step="copy the tokenizer again, or remove it and give prompts as token ids",
        ) from error  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and advice while it loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
