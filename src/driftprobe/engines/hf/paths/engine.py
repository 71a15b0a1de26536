"""PathEngine: runs the reference and the candidate, and hands out the rows that both computed.

A scouting run of each comes first. It tells which tokens stand where, which axis of each output counts them, in what
order modules run, and what cannot be compared; that is counted and named, never dropped in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from driftprobe.engines.base import Constant
from driftprobe.engines.hf.anatomy import refuse_compiled
from driftprobe.engines.hf.engine import HFEngine, _accumulates, _casts
from driftprobe.engines.hf.host import to_array
from driftprobe.engines.hf.lifting import RUNG, Narrowings, lifted
from driftprobe.engines.hf.noise import rounding_noise
from driftprobe.engines.hf.paths.axes import Layout, find_layout, follows_keys
from driftprobe.engines.hf.paths.calls import Locate, Placed
from driftprobe.engines.hf.paths.listen import Key, Listener, Scouted
from driftprobe.engines.hf.paths.matrices import module_weights
from driftprobe.engines.hf.paths.names import Place, name_points
from driftprobe.errors import EngineError, UsageError
from driftprobe.fingerprint import UNIT_ROUNDOFF, Array
from driftprobe.taps import BY_NAME, place
from driftprobe.trace import EngineFacts

Path = Callable[[Any], Any]
"""`f(model)`: runs the model as it pleases; what it returns is not looked at."""
Lift = Callable[[nn.Module], AbstractContextManager[Any]]
"""What a run stands under: nothing, or a lift of the model to a higher precision."""


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WIDE_DEVICES = ("cpu", "cuda", "xpu")


@dataclass(frozen=True, slots=True)
class Row:
    """One tap of one position, as the last call that computed it left it."""

    layer: int | None
    tensor: str
    order: int
    position: int
    token: int | None
    array: Array
    """`[1, …]`."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What two paths have in common, and what of each was left out."""

    sequence: tuple[int | None, ...]
    """The reference's token at every position."""
    positions: tuple[int, ...]
    """The positions that are compared; with none in common the reference's first, which finds no partner."""
    common: int
    """How many positions both computed."""
    only_reference: int
    only_candidate: int
    stray: int | None
    """The first position at which the candidate went on with another token than the reference; None without one."""
    moved: int
    """Rows of the candidate whose position is not the one that its calls named."""
    taps: dict[Key, Place] = field(default_factory=dict)
    """In order of execution."""
    layouts: dict[Key, Layout] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """Reason -> tap -> in how many calls it fired."""
    calls: dict[str, dict[int, Placed]] = field(default_factory=dict)
    """Arm -> position -> the last call that computed it."""


class PathEngine:
    """Two ways to run one model.

    `model` is a module, or a function that makes one anew for every run, where a run leaves state behind. `rows` name
    the batch row of each side, None takes the one whose tokens agree.
    """

    def __init__(
        self,
        model: Any,
        reference: Path,
        candidate: Path,
        *,
        rows: tuple[int | None, int | None] = (None, None),
        locate: Locate | None = None,
        seed: int = 0,
    ) -> None:
        self._source, self._paths, self._rows = model, {"P": reference, "D": candidate}, rows
        self._locate, self._seed = locate, seed
        self._lift: Lift | None = None
        first = self._model()
        refuse_compiled(first)
        self._hf = _driven(first)
        known = (None, {}) if self._hf is None else (self._hf.anatomy, self._hf.taps)
        self._naming = name_points(first, *known)
        self._dtype, self._device = _dtype(first), _device(first)
        self.parameters = sum(parameter.numel() for parameter in first.parameters())
        self.rungs = _rungs(first)
        self._label = f"object:{type(first).__name__}"
        self._attention = str(getattr(getattr(first, "config", None), "_attn_implementation", None) or "")
        self._inner_cast: dict[str, str] = {}
        self.perturbs = next(first.parameters(), None) is not None

    @property
    def facts(self) -> EngineFacts:
        """What is known of the model; see EngineFacts."""
        library = sys.modules.get("transformers")
        versions = [f"transformers {library.__version__}"] if library is not None else []
        kind = SimpleNamespace(dtype=getattr(torch, self._dtype), device=torch.device(self._device))
        return EngineFacts(
            name="paths", version=", ".join([*versions, f"torch {torch.__version__}"]), model=self._label,
            dtype=self._dtype, casts=self._casts, accumulate=_accumulates(kind),
            attention=self._attention, layers=self._naming.layers,
            device=self._device,
        )  # fmt: skip

    @property
    def _casts(self) -> dict[str, str]:
        kind = SimpleNamespace(dtype=getattr(torch, self._dtype), device=torch.device(self._device))
        return {**_casts(kind), **self._inner_cast}

    @contextmanager
    def at(self, rung: str) -> Iterator[None]:
        """Run at a rung of the precision ladder (`rungs` names them) while the context lasts; see lifting."""
        before = self._dtype, self._inner_cast
        self._lift, self._dtype, self._inner_cast = lifted, rung, {}
        try:
            yield
        finally:
            self._lift, (self._dtype, self._inner_cast) = None, before

    def constants(self) -> Iterator[Constant]:
        """Return the small constants of a transformers model; none of any other."""
        if self._hf is not None:
            with self._standing(self._hf.model):
                yield from self._hf.constants(frozenset(range(self._naming.layers)))

    def weights(self, layer: int | None, tensor: str) -> Iterator[Constant]:
        """Return the matrices of the op or module behind a tap; see Engine.weights, module_weights."""
        if self._hf is not None and tensor in BY_NAME:
            yield from self._hf.weights(layer, tensor)
        yield from module_weights(self._model(), self._naming, layer, tensor)

    def scout(self, limit: int) -> Compared:
        """Run both paths once and return what they have in common, at most `limit` positions of it.

        Raises EngineError where a path fails, or makes no forward call with tokens.
        """
        first = self._scout("P", None)
        sequence = first.sequence
        again, other = self._scout("P", sequence), self._scout("D", sequence)
        extra = self._shorter(sequence) if len(_lengths(again, other)) < 2 else None
        left, right = _computed(again), _computed(other)
        common = sorted(left & right)
        layouts, left_out = self._comparable(again, other, extra)
        if not layouts:
            raise EngineError(
                "nothing can be compared", where="probe_paths(reference=…, candidate=…)",
                measured=f"{len(left_out)} reasons: {', '.join(left_out)}",
                allowed="one module or more that both paths run, with an axis that counts tokens",
                next_step="let both functions call the model with token ids [batch, tokens]",
            )  # fmt: skip
        strays = [p.stray for p in other.placed if p.stray is not None and p.stray not in right]
        return Compared(
            sequence=tuple(sequence),
            positions=_chosen(common, limit, _edges(again, other)) or tuple(sorted(left)[:1]),
            common=len(common),
            only_reference=len(left - right),
            only_candidate=len(right - left),
            stray=min(strays, default=None),
            moved=sum(p.moved for p in other.placed),
            taps=self._named(key for key in again.fired if key in layouts),
            layouts=layouts,
            left_out=left_out,
            calls={"P": _last_calls(again), "D": _last_calls(other)},
        )

    def run(self, arm: str, compared: Compared, noise_seed: int | None = None) -> Iterator[Row]:
        """Run one arm (`P`, `D`, a repetition, or `N…` under rounding noise) and yield its rows, tap by tap."""
        side = "D" if arm.startswith("D") else "P"
        model = self._model()
        listener = Listener(
            model, self._naming, sequence=compared.sequence, row=self._rows[side == "D"], locate=self._locate,
            layouts=compared.layouts, wanted=frozenset(compared.positions),
        )  # fmt: skip
        noise = nullcontext() if noise_seed is None else rounding_noise(model, noise_seed, self._casts)
        with self._standing(model), noise, listener.installed():
            self._call(side, model)
        for order, (key, (layer, tensor)) in enumerate(compared.taps.items()):
            for position, value in sorted(listener.heard.rows.get(key, {}).items()):
                yield Row(layer, tensor, order, position, compared.sequence[position],
                          to_array(self._with_heads(tensor, value)))  # fmt: skip

    def _with_heads(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        count = self._naming.heads.get(tensor, 0)
        return value.reshape(1, count, -1) if count and value.dim() == 2 and value.shape[1] % count == 0 else value

    def _model(self) -> nn.Module:
        model = self._source if isinstance(self._source, nn.Module) else self._source()
        if not isinstance(model, nn.Module):
            raise UsageError(
                "not a model", where="probe_paths(model)", measured=type(model).__name__,
                allowed="a torch.nn.Module, or a function without arguments that makes one",
                next_step="hand over the module itself",
            )  # fmt: skip
        return model

    @contextmanager
    def _standing(self, model: nn.Module) -> Iterator[None]:
        """Keep a model in evaluation mode, lifted where that is asked for, with a seed of its own for sampling."""
        before = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with self._lift(model) if self._lift is not None else nullcontext(), torch.no_grad(), _seeded(self._seed):
                yield
        finally:
            for module, training in before:
                module.training = training

    def _call(self, side: str, model: nn.Module) -> None:
        name = "reference" if side == "P" else "candidate"
        try:
            self._paths[side](model)
        except Exception as error:  # whatever the user's own code raises
            raise EngineError(
                f"the {name} failed while it ran", where=f"probe_paths({name}=…)",
                measured=f"{type(error).__name__}: {error}", allowed="a function of the model that returns",
                next_step=f"call your {name} on the model alone and see whether it works there",
            ) from error  # fmt: skip

    def _scout(self, side: str, sequence: list[int | None] | None) -> Scouted:
        model = self._model()
        listener = Listener(model, self._naming, sequence=sequence, row=self._rows[side == "D"], locate=self._locate)
        watching = Narrowings() if self._dtype == "float64" else None
        with self._standing(model), listener.installed(), watching if watching is not None else nullcontext():
            self._call(side, model)
        if watching is not None and watching.coarsest is not None:
            self._inner_cast = {"inside ops": watching.coarsest}
        if not listener.scouted.calls:
            name = "reference" if side == "P" else "candidate"
            raise EngineError(
                "no forward call was seen", where=f"probe_paths({name}=…)", measured="0 calls with token ids",
                allowed="one call or more of the model itself, model(ids), with ids an integer tensor [batch, tokens]",
                next_step="call the model that your function is given, not a part of it",
            )  # fmt: skip
        return listener.scouted

    def _shorter(self, sequence: list[int | None]) -> Scouted | None:
        """Call the model on a shorter text, to see which axes follow; None where it takes no plain call."""
        ids = [token for token in sequence[:-1] if token is not None]
        if len(ids) < len(sequence) - 1 or len(ids) < 2:
            return None
        model = self._model()
        listener = Listener(model, self._naming)
        try:
            with self._standing(model), listener.installed():
                model(torch.tensor([ids], device=_device(model)))
        except Exception:  # an extra look only: this model wants more than tokens
            return None
        return listener.scouted

    def _comparable(
        self, left: Scouted, right: Scouted, extra: Scouted | None
    ) -> tuple[dict[Key, Layout], dict[str, dict[str, int]]]:
        """Return the layout of each point that fired on both sides, and what was left out, by reason."""
        runs = [run for run in (left, right, extra) if run is not None]
        keys = dict.fromkeys([*left.fired, *right.fired])
        found: dict[Key, Layout] = {}
        out: dict[str, dict[str, int]] = {}
        for key in keys:
            calls = len(left.fired.get(key, ())) + len(right.fired.get(key, ()))
            sizes = [size for run in runs for size in run.sizes.get(key, [])]
            layout = find_layout(sizes)
            if any(key in run.shapeless for run in runs):
                reason = "no tensor"
            elif any(key in run.shuffled for run in runs):
                reason = "rows in another order"
            elif layout is None:
                reason = "no token axis"
            elif follows_keys(layout, sizes):
                reason = "an axis of keys"
            elif key not in left.fired or key not in right.fired:
                reason = f"only in the {'candidate' if key not in left.fired else 'reference'}"
            else:
                found[key] = layout
                continue
            out.setdefault(reason, {})[place(*self._naming.place(*key))] = calls
        routed = [key for key in found if _routed(key[0], self._naming.stack, found, runs) or _varies(key, found, runs)]
        for key in routed:
            calls = len(left.fired[key]) + len(right.fired[key])
            out.setdefault("routed tokens", {})[place(*self._naming.place(*key))] = calls
            del found[key]
        return found, out

    def _named(self, keys: Iterator[Key]) -> dict[Key, Place]:
        """Return the places of points, each with a name of its own."""
        named: dict[Key, Place] = {}
        taken: set[Place] = set()
        for key in keys:
            layer, tensor = self._naming.place(*key)
            while (layer, tensor) in taken:
                tensor += "~"
            taken.add((layer, tensor))
            named[key] = (layer, tensor)
        return named


def _routed(module: str, stack: str, found: dict[Key, Layout], runs: list[Scouted]) -> bool:
    """Whether a module stands in a list whose members do not all run in every call, or not on whole calls: experts."""
    parts = module.split(".")
    for at, part in enumerate(parts):
        owner = ".".join(parts[:at])
        if not part.isdigit() or owner == stack:
            continue
        for run in runs:
            members: dict[str, set[int]] = {}
            for (name, side, _), calls in run.fired.items():
                rest = name[len(owner) + 1 :].split(".")[0] if name.startswith(f"{owner}.") else ""
                if rest.isdigit() and side == "output":
                    members.setdefault(rest, set()).update(calls)
            if len({frozenset(calls) for calls in members.values()}) > 1:
                return True
        siblings = {key for run in runs for key in run.fired if _member_of(key[0], owner)}
        if any(key not in found for key in siblings):
            return True
    return False


def _varies(key: Key, found: dict[Key, Layout], runs: list[Scouted]) -> bool:
    """Whether a module fires more often in some calls than in others, or not always on whole calls: once an expert.

    Its second firing is the second expert that a call happens to need, even where all tokens go there.
    """
    module, side, _ = key
    for run in runs:
        firings = {other: calls for other, calls in run.fired.items() if other[:2] == (module, side)}
        if len(firings) > 1 and len({frozenset(calls) for calls in firings.values()}) > 1:
            return True
        if any(other not in found for other in firings):
            return True
    return False


def _member_of(name: str, owner: str) -> bool:
    return name.startswith(f"{owner}.") and name[len(owner) + 1 :].isdigit()


def _driven(model: nn.Module) -> HFEngine | None:
    """Return a transformers model's engine, whose anatomy and taps are checked; None for any other model."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    try:
        return HFEngine(model)
    except Exception:  # an architecture that the engine cannot drive by itself: its modules keep their own names
        return None


def _rungs(model: nn.Module) -> tuple[str, ...]:
    """Return `float64` where all weights are plain floats and their device computes in it."""
    weights = list(model.parameters())
    wide = all(w.dtype in _FLOATS and w.device.type in _WIDE_DEVICES for w in weights)
    return (RUNG,) if weights and wide else ()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _dtype(model: nn.Module) -> str:
    """Return the coarsest dtype of the parameters and float buffers; float32 without any."""
    tensors = [*model.parameters(), *model.buffers()]
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    return max((name for name in names if name in UNIT_ROUNDOFF), key=UNIT_ROUNDOFF.__getitem__, default="float32")


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return str(parameter.device) if parameter is not None else "cpu"


def _lengths(*runs: Scouted) -> set[int]:
    return {size.count for run in runs for sizes in run.sizes.values() for size in sizes}


def _computed(run: Scouted) -> set[int]:
    return {position for placed in run.placed for _, position in placed.positions}


def _last_calls(run: Scouted) -> dict[int, Placed]:
    return {position: placed for placed in run.placed for _, position in placed.positions}


def _edges(*runs: Scouted) -> set[int]:
    """Return the first and last position of every call: what state is carried over, and where, shows there."""
    ends = [placed.positions for run in runs for placed in run.placed if placed.positions]
    return {pairs[i][1] for pairs in ends for i in (0, -1)}


def _chosen(common: list[int], limit: int, edges: set[int]) -> tuple[int, ...]:
    """Return at most `limit` positions: the ends, the edges of calls while there is room, and others evenly between."""
    if len(common) <= limit:
        return tuple(common)
    wanted = dict.fromkeys([common[0], common[-1]])
    spread = [common[i * (len(common) - 1) // max(limit - 1, 1)] for i in range(limit)]
    near = [position for position in common if position in edges]
    half = near[:: max(1, -(-len(near) // max(limit // 2, 1)))]
    for position in [*half, *spread]:
        if len(wanted) < limit:
            wanted.setdefault(position)
    return tuple(sorted(wanted))[:limit]
