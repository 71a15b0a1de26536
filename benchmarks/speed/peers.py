"""The same prefill and decode step under other tracers, each in a process of its own and against its own bare run.

    python -m benchmarks.speed.peers NAME REPETITIONS      prints JSON: phase -> ratio, or why there is none

What each does is said beside it: most keep references and compute nothing.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.speed.figures import in_turn

TIME_LIMIT = 240
"""Seconds for one peer; what takes longer is told as such."""
Phases = dict[str, tuple[Callable[[], float], Callable[[], float]]]
"""Phase -> seconds of a bare call, seconds of a traced one."""


def measure(name: str, repetitions: int) -> dict[str, object]:
    """Return a peer's ratios by phase, or `reason`."""
    command = [sys.executable, "-m", "benchmarks.speed.peers", name, str(repetitions)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {TIME_LIMIT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or ["no output"]
        return {"reason": said[-1][:200]}
    found: dict[str, object] = json.loads(lines[-1])
    return found


def bare_hooks() -> Phases:
    """Keep a reference to every module's output: what no tracer can be cheaper than."""

    @contextmanager
    def traced(model: Any) -> Iterator[None]:
        kept: list[Any] = []
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_hook(lambda _m, _a, output: kept.append(output)).remove)
            yield

    return _around(traced)


def torch_reductions() -> Phases:
    """Eight reductions in torch of every module's output, read at the end."""
    import torch

    def reduce(output: Any) -> list[Any]:
        value = output[0] if isinstance(output, tuple) else output
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return []
        wide = value.double()
        return [wide.count_nonzero(), wide.abs().sum(), wide.min(), wide.max(), wide.mean(), wide.norm(),
                value.isnan().sum(), value.isinf().sum()]  # fmt: skip

    @contextmanager
    def traced(model: Any) -> Iterator[None]:
        kept: list[Any] = []
        with ExitStack() as stack:
            for module in model.modules():
                stack.callback(module.register_forward_hook(lambda _m, _a, output: kept.extend(reduce(output))).remove)
            yield
            [float(value) for value in kept]

    return _around(traced)


def hf_model_debugger() -> Phases:
    """transformers' own model_addition_debugger: every module's inputs and outputs as text."""
    from transformers.model_debugging_utils import model_addition_debugger_context

    @contextmanager
    def traced(model: Any) -> Iterator[None]:
        known = inspect.signature(model_addition_debugger_context).parameters
        with tempfile.TemporaryDirectory() as folder:
            options = {"debug_path": folder, "do_prune_layers": False}
            with model_addition_debugger_context(model, **{k: v for k, v in options.items() if k in known}):
                yield

    return _around(traced)


def nnsight() -> Phases:
    """NNsight's trace with the output of every module saved: references."""
    import torch
    from nnsight import NNsight

    from benchmarks.speed.subject import Bare, llama

    model = llama()
    order: list[str] = []
    hooks = [module.register_forward_hook(lambda _m, _a, _o, name=name: order.append(name))
             for name, module in model.named_modules() if name]  # fmt: skip
    bare = Bare(model)
    bare.prefill()
    for hook in hooks:
        hook.remove()
    seen = NNsight(model)

    def run(ids: Any, **kw: Any) -> float:
        started = time.perf_counter()
        with torch.no_grad(), seen.trace(input_ids=ids, use_cache=True, **kw):
            kept = []
            for name in order:
                kept.append(seen.get(name).output.save())
        return time.perf_counter() - started

    def decode() -> float:
        return run(bare.next, position_ids=bare.position, past_key_values=bare._prefilled()[1])

    return {"prefill": (bare.prefill, lambda: run(bare.prompt)), "decode": (bare.decode, decode)}


def transformer_lens() -> Phases:
    """TransformerLens' bridge around the same model, run_with_cache: references."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    from benchmarks.speed.subject import Bare, llama
    from driftprobe.engines.base import BUILTIN

    model = llama()
    bare, tokenizer = Bare(model), AutoTokenizer.from_pretrained(BUILTIN["builtin:tiny"])  # it asks for one
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)

    def run(ids: Any, **kw: Any) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            bridge.run_with_cache(ids, use_cache=True, **kw)
        return time.perf_counter() - started

    def decode() -> float:
        return run(bare.next, position_ids=bare.position, past_key_values=bare._prefilled()[1])

    return {"prefill": (bare.prefill, lambda: run(bare.prompt)), "decode": (bare.decode, decode)}


def torchlens() -> Phases:
    """TorchLens' log of a forward pass, every op saved: references, and the graph."""
    import torch
    import torchlens as tl

    from benchmarks.speed.subject import Bare, llama

    model = llama()
    bare = Bare(model)
    log = getattr(tl, "log_forward_pass", None) or tl.trace

    def prefill() -> float:
        started = time.perf_counter()
        with torch.no_grad():
            log(model, bare.prompt)
        return time.perf_counter() - started

    return {"prefill": (bare.prefill, prefill)}


def msprobe() -> Phases:
    """MindStudio Probe, task statistics at level L0 (modules), written to disk."""
    from msprobe.pytorch import PrecisionDebugger

    folder = Path(tempfile.mkdtemp())
    settings = folder / "config.json"
    settings.write_text(json.dumps({
        "task": "statistics", "dump_path": str(folder / "dump"), "rank": [], "step": [], "level": "L0",
        "statistics": {"scope": [], "list": [], "data_mode": ["all"], "summary_mode": "statistics"},
    }), encoding="utf-8")  # fmt: skip
    debugger = PrecisionDebugger(config_path=str(settings))

    @contextmanager
    def traced(model: Any) -> Iterator[None]:
        debugger.start(model)
        yield
        debugger.stop()
        debugger.step()

    return _around(traced)


PEERS: dict[str, Callable[[], Phases]] = {
    "bare hooks": bare_hooks,
    "hooks, 8 torch reductions": torch_reductions,
    "TransformerLens": transformer_lens,
    "nnsight": nnsight,
    "TorchLens": torchlens,
    "msprobe statistics L0": msprobe,
    "HF model debugger": hf_model_debugger,
}


def _around(traced: Callable[[Any], Any]) -> Phases:
    """Return the phases of a tracer that is a context around a call, putting it in and taking it out included."""
    import torch

    from benchmarks.speed.subject import Bare, llama

    model = llama()
    bare = Bare(model)

    def prefill() -> float:
        started = time.perf_counter()
        with torch.no_grad(), traced(model):
            model(bare.prompt, use_cache=True)
        return time.perf_counter() - started

    def decode() -> float:
        cache = bare._prefilled()[1]
        started = time.perf_counter()
        with torch.no_grad(), traced(model):
            model(bare.next, position_ids=bare.position, past_key_values=cache, use_cache=True)
        return time.perf_counter() - started

    return {"prefill": (bare.prefill, prefill), "decode": (bare.decode, decode)}


def main() -> None:
    """Measure the peer that is named and print its JSON."""
    import torch

    torch.set_num_threads(1)
    name, repetitions = sys.argv[1], int(sys.argv[2])
    found = {}
    for phase, (bare, traced) in PEERS[name]().items():
        found[phase] = in_turn(bare, {name: traced}, repetitions)[name].as_json()
    print(json.dumps({"does": inspect.getdoc(PEERS[name]), "phases": found}))


if __name__ == "__main__":
    main()
