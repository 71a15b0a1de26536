"""The options that choose an engine and its model, the same for every command that runs one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from driftprobe.engines import open_engine
from driftprobe.engines.base import Engine

_F = TypeVar("_F", bound=Callable[..., Any])
NAMES = ("engine", "model", "dtype", "attn", "config", "flash_attn", "cache_type", "threads")


def engine_options(command: _F) -> _F:
    """Add the options to a command; they reach it as keyword arguments of NAMES."""
    for option in reversed(
        (
            click.option("--engine", default="hf", show_default=True, help="Engine (see `driftprobe engines`)."),
            click.option("--model", default="builtin:tiny", show_default=True,
                         help="builtin:tiny, a local model folder, or what the engine calls a model."),
            click.option("--dtype", default=None, help="float64, float32, bfloat16 or float16. Default: float32."),
            click.option("--attn", default=None, help="eager or sdpa. Default: the model's own."),
            click.option("--config", default=None, help="Engine `command`: the TOML file that says how it is run."),
            click.option("--flash-attn", default=None, help="Engine `llamacpp`: on or off. Default: llama.cpp's own."),
            click.option("--cache-type", default=None, help="Engine `llamacpp`: f32, f16, q8_0 or q4_0. Default: f16."),
            click.option("--threads", type=int, default=None, help="Engine `llamacpp`: threads. Default: up to 4."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def opened(engine: str, model: str, **options: str | int | None) -> Engine:
    """Return the engine that the options name; those that were not given are its own business."""
    given = {name: value for name, value in options.items() if value is not None}
    return open_engine(engine, model=model, **given)
