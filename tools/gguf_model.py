#!/usr/bin/env python3
"""Write the built-in model as a GGUF file, so that the same weights run in llama.cpp and in transformers.

    python tools/gguf_model.py tiny.gguf
    python tools/gguf_model.py tiny-q8_0.gguf --type q8_0

Rows of the built-in model have 192 elements, and a K-quant's block has 256: llama.cpp keeps those matrices in another
type. `--random` writes an untrained Llama of width 256 instead, for types that need it. F32 is written with the gguf
library; all other types are made from it by llama.cpp itself. Needs `pip install -e '.[llamacpp]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

TINY = Path(__file__).resolve().parents[1] / "src" / "driftprobe" / "models" / "tiny"
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k": 14, "bf16": 32}
"""Type of the matrices -> llama.cpp's number for a file of it (`llama_ftype`); `q4_k` is Q4_K_S."""

Weights = dict[str, npt.NDArray[np.float32]]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama that its GGUF has to state."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    positions: int
    vocabulary: int = 257
    rope_base: float = 10000.0
    epsilon: float = 1e-6


RANDOM = Shape(layers=3, width=256, heads=4, kv_heads=2, head_dim=64, mlp_width=512, positions=1024)


def tiny() -> tuple[Shape, Weights]:
    """Return the built-in model."""
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        mlp_width=config["intermediate_size"],
        positions=config["max_position_embeddings"],
        vocabulary=config["vocab_size"],
        rope_base=config["rope_theta"],
        epsilon=config["rms_norm_eps"],
    )
    return shape, load_file(TINY / "model.safetensors")


def random(shape: Shape = RANDOM, seed: int = 0) -> tuple[Shape, Weights]:
    """Return an untrained model: normal weights of variance 1/inputs, norms around one."""
    generator = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return (generator.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> npt.NDArray[np.float32]:
        return (1 + 0.1 * generator.standard_normal(shape.width)).astype(np.float32)

    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {
        "model.embed_tokens.weight": generator.standard_normal((shape.vocabulary, shape.width)).astype(np.float32),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(shape.vocabulary, shape.width),
    }
    for layer in range(shape.layers):
        parts = {
            "input_layernorm": norm(),
            "self_attn.q_proj": matrix(queries, shape.width),
            "self_attn.k_proj": matrix(keys, shape.width),
            "self_attn.v_proj": matrix(keys, shape.width),
            "self_attn.o_proj": matrix(shape.width, queries),
            "post_attention_layernorm": norm(),
            "mlp.gate_proj": matrix(shape.mlp_width, shape.width),
            "mlp.up_proj": matrix(shape.mlp_width, shape.width),
            "mlp.down_proj": matrix(shape.width, shape.mlp_width),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    return shape, weights


def write_gguf(shape: Shape, weights: Weights, out: Path, kind: str = "f32") -> None:
    """Write a Llama's weights as a GGUF file whose matrices are of a type of TYPES."""
    if kind == "f32":
        _write_f32(shape, weights, out)
        return
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "f32.gguf"
        _write_f32(shape, weights, exact)
        _convert(exact, out, kind)


def _write_f32(shape: Shape, weights: Weights, out: Path) -> None:
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.mlp_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer)
    for name, weight in weights.items():
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(_laid_out(name, weight, shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", maxsplit=1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def _laid_out(name: str, weight: npt.NDArray[np.float32], shape: Shape) -> npt.NDArray[np.float32]:
    """Return a matrix as llama.cpp wants it: its Llama rotates neighbouring dimensions, where ours rotates halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    halves = weight.reshape(-1, 2, shape.head_dim // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Add a tokenizer of bytes: id = byte value, and 256 begins and ends a text (never added by itself)."""
    vocabulary = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "<|endoftext|>"]
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["<|endo ftext|>"])  # a list is needed, and an empty one cannot be written
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)


def _convert(exact: Path, out: Path, kind: str) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.pure = TYPES[kind], 1, True
    with _silent():
        code = llama_cpp.llama_model_quantize(os.fsencode(exact), os.fsencode(out), ctypes.byref(settings))
    if code != 0:
        raise SystemExit(f"error: llama.cpp cannot convert the model to {kind} (code {code})")


_QUIET: list[object] = []
"""The function that swallows llama.cpp's lines; it must live as long as they come."""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep llama.cpp's own lines, one for each tensor, off the terminal."""
    import llama_cpp

    if not _QUIET:
        _QUIET.append(llama_cpp.llama_log_callback(lambda *_: None))
    llama_cpp.llama_log_set(_QUIET[0], None)
    out, err, null = os.dup(1), os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(out, 1)
        os.dup2(err, 2)
        for handle in (out, err, null):
            os.close(handle)


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write the built-in model as a GGUF file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=sorted(TYPES), default="f32")
    parser.add_argument("--random", action="store_true", help="an untrained Llama of width 256 instead")
    chosen = parser.parse_args()
    shape, weights = random() if chosen.random else tiny()
    write_gguf(shape, weights, chosen.out, chosen.type)
    print(f"{chosen.out}: {chosen.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
