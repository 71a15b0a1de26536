"""Hypotheses about the residual stream: taken from the wrong place, a branch lost, embedding scale and position."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from driftprobe.fingerprint import Float64
from driftprobe.hypotheses.ops import norm_of
from driftprobe.hypotheses.view import Guess, Guesses, View

_BRANCHES = {"x_mid": ("attn_out",), "x_out": ("mlp_out",)}
_SOURCES = {"x_mid": ("attn_norm", "embed"), "x_out": ("ffn_norm", "x_in", "attn_norm")}
"""Where a residual may be taken from by mistake."""


def stream(view: View) -> Float64 | None:
    """Return the residual stream at the failing tap: what comes in, and the branches that are added."""
    if view.tensor == "x_in":
        return _first_input(view) if view.layer == 0 else view.tap("x_out", (view.layer or 0) - 1)
    source, branches = _source(view), dict(_branches(view))
    if source is None or not branches:
        return None
    return _sum(source, list(branches.values()))


def guesses(view: View) -> Guesses:
    """Yield what the stream would be at the failing tap under each cause."""
    result = view.result()
    if result is None or view.tensor not in ("x_in", "x_mid", "x_out"):
        return
    found = _of_input(view, result) if view.tensor == "x_in" else _of_sum(view)
    yield from (guess for guess in found if guess.predicted.shape == result.shape)


def _source(view: View) -> Float64 | None:
    """Return what the failing sum starts from: before the MLP where there is such a tap, else the layer's input."""
    return view.first("x_mid", "x_in") if view.tensor == "x_out" else view.tap("x_in")


def _branches(view: View) -> Iterator[tuple[str, Float64]]:
    parallel = view.tensor == "x_out" and view.tap("x_mid") is None
    factor = view.number("residual.multiplier", None)
    for name in ("attn_out", "mlp_out") if parallel else _BRANCHES[view.tensor]:
        branch, norm = view.tap(name), norm_of(view, f"{view.tensor}.branch")
        if branch is not None:
            branch = branch if norm is None else norm(branch)
            yield name, branch if factor is None else branch * factor


def _sum(source: Float64, branches: list[Float64]) -> Float64 | None:
    shapes = {source.shape, *(branch.shape for branch in branches)}
    return np.asarray(sum(branches, start=source)) if len(shapes) == 1 else None


def _of_sum(view: View) -> Guesses:
    source, branches = _source(view), dict(_branches(view))
    if source is None or not branches:
        return
    for name in branches:
        rest = _sum(source, [branch for other, branch in branches.items() if other != name])
        if rest is not None:
            yield Guess("branch_missing", {"branch": name}, rest)
    for name in _SOURCES[view.tensor]:
        other = view.tap(name, None) if name == "embed" else view.tap(name)
        whole = None if other is None else _sum(other, list(branches.values()))
        if whole is not None:
            yield Guess("residual_source", {"source": name}, whole)


def _position(view: View) -> int:
    return view.scene.position


def _first_input(view: View) -> Float64 | None:
    """Return the first layer's input: the embedding, scaled, with its position's embedding."""
    embed, table = view.tap("embed", None), view.constant("x_in.positions")
    if embed is None:
        return None
    scaled = embed * (view.number("embed.scale", None) or 1.0)
    if table is None:
        return scaled
    at = _position(view)
    return scaled + table[at] if at < len(table) and table.shape[1] == scaled.shape[1] else None


def _of_input(view: View, result: Float64) -> Guesses:
    if view.layer != 0:
        return
    expected, table = _first_input(view), view.constant("x_in.positions")
    if expected is None:
        expected = view.of_other()
    if expected is None or expected.shape != result.shape:
        return
    size = float(np.square(expected).sum())
    factor = float((expected * result).sum() / size) if size else 0.0
    yield Guess("embedding_scale", {"factor": factor}, factor * expected, fitted=1)
    if table is None or table.shape[1] != result.shape[-1]:
        return
    at = _position(view)
    bare = expected - table[at]
    used = int(np.square(table - (result - bare)).sum(-1).argmin())
    if used != at:
        yield Guess("learned_position", {"used": used, "expected": at}, bare + table[used])
