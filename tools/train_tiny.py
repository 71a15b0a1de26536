#!/usr/bin/env python3
"""Train, save and score `builtin:tiny`, the byte-level Llama that ships inside driftprobe.

Training text: the `.py` sources of the standard library of the Python that runs this script, in sorted
order, one end-of-text token between files.  Five modules are kept out of it; their text is stored next to
this script (`tiny_heldout.txt`), and so are the byte counts of the training text (`tiny_corpus.json`), so
that the figures can be printed again anywhere, without training and without that Python version:

    python tools/train_tiny.py --evaluate

Training again (replaces the model folder and `tiny_corpus.json`; half an hour on one core):

    python tools/train_tiny.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

TOOLS = Path(__file__).resolve().parent
MODEL_DIR = TOOLS.parent / "src" / "driftprobe" / "models" / "tiny"
HELD_OUT_FILE = TOOLS / "tiny_heldout.txt"
CORPUS_FILE = TOOLS / "tiny_corpus.json"

HELD_OUT_MODULES = ("bisect.py", "csv.py", "graphlib.py", "heapq.py", "json/decoder.py")
# Tests and bundled wheels, and what is not prose or code that a person wrote: character tables, the
# generated help topics, and the build settings of the local machine.
SKIPPED_FOLDERS = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"),
    *("site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data"),
}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256  # ids 0 to 255 are the byte values
SHAPE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": END_OF_TEXT_ID,
    "eos_token_id": END_OF_TEXT_ID,
}
# Written to config.json but not passed to LlamaConfig: transformers 4 and 5 name these settings differently,
# and both read this spelling.  10000 is the default of both.
SPELLED_FOR_ALL_VERSIONS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "torch_dtype": "float32",
    "use_cache": True,
}


# --- text -----------------------------------------------------------------------------------------------


def is_training_source(relative: Path) -> bool:
    """Whether a file of the standard library, named relative to its root, belongs to the training text."""
    if relative.as_posix() in HELD_OUT_MODULES or relative.name.startswith(SKIPPED_PREFIXES):
        return False
    folders = relative.parts[:-1]
    return not any(name in SKIPPED_FOLDERS or name.startswith(SKIPPED_PREFIXES) for name in folders)


def read_training_sources(root: Path) -> dict[str, bytes]:
    """The training files under `root` by relative name, in sorted order; empty files are left out."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    sources = {name: (root / name).read_bytes() for name in names if is_training_source(Path(name))}
    return {name: text for name, text in sources.items() if text}


def describe_corpus(sources: dict[str, bytes]) -> dict[str, Any]:
    """What `tiny_corpus.json` says about the training text.

    The digest runs over name, NUL, content, NUL of each file in turn.
    """
    digest = hashlib.sha256()
    counts: Counter[int] = Counter()
    for name, text in sources.items():
        digest.update(name.encode() + b"\0" + text + b"\0")
        counts.update(text)
    return {
        "cpython": platform.python_version(),
        "files": len(sources),
        "bytes": sum(map(len, sources.values())),
        "sha256": digest.hexdigest(),
        "byte_counts": [counts[value] for value in range(256)],
    }


def as_tokens(sources: dict[str, bytes]) -> Tensor:
    """All files as one row of token ids, an end-of-text token before each file and after the last."""
    ids = [END_OF_TEXT_ID]
    for text in sources.values():
        ids.extend(text)
        ids.append(END_OF_TEXT_ID)
    return torch.tensor(ids, dtype=torch.int16)


def batches(tokens: Tensor, batch: int, context: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of shape (batch, context + 1).

    Each pass cuts the text into windows from a fresh random start and visits them once, in random order.
    """
    while True:
        shift = int(torch.randint(context, (1,), generator=generator))
        starts = torch.arange(shift, len(tokens) - context, context)
        order = starts[torch.randperm(len(starts), generator=generator)]
        for group in order[: len(order) // batch * batch].split(batch):
            yield torch.stack([tokens[start : start + context + 1] for start in group.tolist()]).long()


# --- training -------------------------------------------------------------------------------------------


def learning_rate(progress: float, peak: float, warm_up: float = 0.03, floor: float = 0.02) -> float:
    """Linear rise over the first `warm_up` of the run, then a cosine down to `floor` times the peak."""
    if progress < warm_up:
        return peak * max(progress, 1e-4) / warm_up
    turn = min(1.0, (progress - warm_up) / (1 - warm_up))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * turn)))


def make_optimizer(model: PreTrainedModel, peak: float) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def bits(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in bits."""
    loss = cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction=reduction)
    return loss / math.log(2)


def report(step: int, loss: float, rate: float, elapsed: float, progress: float) -> None:
    """One line of progress."""
    left = elapsed * (1 - progress) / max(progress, 1e-9)
    times = f"{elapsed / 60:.1f} min gone, {left / 60:.1f} min left"
    print(f"step {step} ({progress:.0%})  {loss:.3f} bits/byte  lr {rate:.2e}  {times}", flush=True)


def train(model: PreTrainedModel, tokens: Tensor, args: argparse.Namespace) -> float:
    """Train in place; returns the seconds it took.

    Every `--long-every`-th step uses windows `--long-factor` times as long, with as many fewer rows, so that
    positions beyond `--context` are trained as well.  (Tried: long windows in the last tenth of the run
    only. The loss rose from 1.5 to 2.6 bits per byte at the first of them and ended at 1.9.)
    """
    generator = torch.Generator().manual_seed(args.seed)
    short = batches(tokens, args.batch, args.context, generator)
    rows = max(1, args.batch // args.long_factor)
    long = batches(tokens, rows, args.context * args.long_factor, generator)
    optimizer = make_optimizer(model, args.lr)
    budget = args.minutes * 60 if args.minutes else math.inf
    start, average, progress, step = time.monotonic(), 8.0, 0.0, 0
    model.train()
    while progress < 1:
        rate = learning_rate(progress, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        window = next(long if step % args.long_every == 0 else short)
        loss = bits(model(input_ids=window[:, :-1], use_cache=False).logits, window[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        average += (loss.item() - average) * max(0.02, 1 / step)
        elapsed = time.monotonic() - start
        progress = max(step / args.steps, elapsed / budget)
        if step % 50 == 0 or progress >= 1:
            report(step, average, rate, elapsed, min(progress, 1.0))
    return time.monotonic() - start


# --- saving ---------------------------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte value in a byte-level vocabulary.

    Visible Latin-1 characters stand for themselves; the other bytes take the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(value if value in visible else next(spare)) for value in range(256)]


def make_tokenizer() -> Tokenizer:
    """A tokenizer whose token ids are the byte values; it adds no token of its own."""
    vocabulary = {symbol: value for value, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return tokenizer


def settings_files() -> dict[str, dict[str, Any]]:
    """The JSON files of the model folder, apart from tokenizer.json.

    config.json names no padding token: a Llama that knows one keeps the embedding of that id at zero in
    training, and here that id also starts and ends each text.  Without model_input_names, the tokenizer class
    of transformers 4 returns token_type_ids too, which Llama's `generate` refuses.
    """
    ids = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": SHAPE["max_position_embeddings"],
    }
    return {
        "config.json": dict(sorted({**SHAPE, **SPELLED_FOR_ALL_VERSIONS}.items())),
        "generation_config.json": {**ids, "pad_token_id": END_OF_TEXT_ID},
        "tokenizer_config.json": tokenizer,
    }


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: readers see the old or the new one."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    part.chmod(0o644)
    part.replace(path)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON, whole."""
    text = json.dumps(value, indent=indent) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_folder(model: PreTrainedModel, folder: Path) -> None:
    """Write an ordinary Hugging Face model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / "model.safetensors", lambda part: save_file(weights, part, {"format": "pt"}))
    write_whole(folder / "tokenizer.json", lambda part: make_tokenizer().save(str(part)))
    for name, value in settings_files().items():
        write_json(folder / name, value)


# --- figures --------------------------------------------------------------------------------------------


def unigram_bits(text: bytes, counts: list[int]) -> float:
    """Bits per byte of `text` under byte frequencies, each count raised by one so that none is zero."""
    total = sum(counts) + len(counts)
    return -sum(n * math.log2((counts[value] + 1) / total) for value, n in Counter(text).items()) / len(text)


@torch.no_grad()
def model_bits(model: PreTrainedModel, text: bytes, context: int) -> float:
    """Bits per byte of `text` under the model.

    Windows of `context` tokens move on by half their length; each scores only what the one before did not,
    so after the first window every byte is predicted from at least `context / 2` earlier ones.
    """
    model.eval()
    ids = torch.tensor([END_OF_TEXT_ID, *text])
    total, scored = 0.0, 0
    while scored < len(text):
        start = max(0, scored - context // 2)
        end = min(start + context, len(text))
        logits = model(input_ids=ids[None, start:end], use_cache=False).logits[0, scored - start :]
        total += bits(logits, ids[scored + 1 : end + 1], reduction="sum").item()
        scored = end
    return total / len(text)


def print_figures(model: PreTrainedModel, context: int) -> None:
    """The three figures on the stored held-out text."""
    text = HELD_OUT_FILE.read_bytes()
    corpus = json.loads(CORPUS_FILE.read_text(encoding="utf-8"))
    print(f"held-out text: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    print(f"training text: {corpus['bytes']} bytes of CPython {corpus['cpython']}, sha256 {corpus['sha256']}")
    print(f"bits per byte, uniform: {8.0:.3f}")
    print(f"bits per byte, unigram: {unigram_bits(text, corpus['byte_counts']):.3f}")
    print(f"bits per byte, model:   {model_bits(model, text, context):.3f}  (windows of {context})")


# --- command line ---------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--evaluate", action="store_true", help="print the saved model's figures and stop")
    parser.add_argument("--write-heldout", action="store_true", help="rewrite tiny_heldout.txt and stop")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model folder (default: built-in)")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="end the run, schedule included, within this time")
    parser.add_argument("--batch", type=int, default=8, help="windows per step (default: %(default)s)")
    parser.add_argument("--context", type=int, default=256, help="tokens per window (default: %(default)s)")
    parser.add_argument("--long-every", type=int, default=6, help="steps from one long window to the next")
    parser.add_argument("--long-factor", type=int, default=4, help="how many times longer those are")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def train_and_save(args: argparse.Namespace, root: Path) -> PreTrainedModel:
    """The whole of a training run, from the sources under `root` to the model folder."""
    sources = read_training_sources(root)
    corpus = describe_corpus(sources)
    print(f"training text: {corpus['files']} files, {corpus['bytes']} bytes, sha256 {corpus['sha256']}")
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    print(f"parameters: {sum(p.numel() for p in model.parameters())}", flush=True)
    seconds = train(model, as_tokens(sources), args)
    print(f"trained in {seconds / 60:.1f} min")
    save_folder(model, args.out)
    write_json(CORPUS_FILE, corpus, indent=None)
    return model


def main() -> None:
    """Train, or do the one thing asked for instead."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    root = Path(sysconfig.get_path("stdlib"))
    if args.write_heldout:
        HELD_OUT_FILE.write_bytes(b"".join((root / name).read_bytes() for name in HELD_OUT_MODULES))
    elif args.evaluate:
        print_figures(AutoModelForCausalLM.from_pretrained(args.out), args.context)
    else:
        print_figures(train_and_save(args, root), args.context)


if __name__ == "__main__":
    main()
