"""Plants faults of states: what a prefill leaves behind for the next token is changed in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from driftprobe.engines.hf.cache import layer_count
from driftprobe.engines.hf.planting.base import Planter, Site, after_prefill, cannot_act
from driftprobe.engines.hf.states import stored_states
from driftprobe.faults import Expected


@contextmanager
def _conv_window_short(site: Site, strength: float) -> Iterator[Expected]:
    layers = _layers(site, "conv_window_short", "conv_state")
    kernels = {layer: _kernel(site.anatomy.layers[layer].mixer) for layer in layers}
    lost = int(strength)

    def change(cache: Any) -> None:
        for layer in layers:
            for state in stored_states(cache, layer).conv:
                idle = state.shape[-1] - (kernels[layer] - 1)  # inputs that the next token's window has left behind
                state[..., : max(idle, 0) + lost] = 0

    with after_prefill(site, change):
        yield Expected(layers[0], "conv_state", "contents", "conv_window", {"lost": lost})


def _faded(name: str, cause: str) -> Planter:
    """Return the planter of a recurrent state that is carried over times the strength, or not at all."""

    @contextmanager
    def planted(site: Site, strength: float) -> Iterator[Expected]:
        layers, kept = _layers(site, name, "ssm_state"), 0.0 if cause == "state_lost" else strength

        def change(cache: Any) -> None:
            for layer in range(layer_count(cache)):
                for state in stored_states(cache, layer).recurrent:
                    state.mul_(kept) if kept else state.zero_()

        with after_prefill(site, change):
            yield Expected(layers[0], "ssm_state", "contents", cause, {"factor": kept} if kept else {})

    return planted


def _layers(site: Site, name: str, tensor: str) -> tuple[int, ...]:
    """Return the layers that keep such a state. Raises UsageError where none does."""
    layers = site.taps.get(tensor, ())
    if not layers:
        raise cannot_act(name, f"no layer with a {tensor}", "a state-space, convolution or linear-attention layer")
    return layers


def _kernel(mixer: nn.Module | None) -> int:
    """Return the width of a mixer's own convolution."""
    modules: Iterator[nn.Module] = iter(()) if mixer is None else mixer.modules()
    return next((int(module.kernel_size[0]) for module in modules if isinstance(module, nn.Conv1d)), 1)


PLANTERS: dict[str, Planter] = {
    "conv_window_short": _conv_window_short,
    "state_not_carried": _faded("state_not_carried", "state_lost"),
    "state_faded": _faded("state_faded", "state_scaled"),
}
