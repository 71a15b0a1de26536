"""Take the pictures of docs/how-it-decides.md and docs/mathematics.md from real runs of the built-in model.

python tools/docs_pictures.py            writes docs/pictures/ anew: six runs and a Chromium, a minute or two
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driftprobe import load_traces, probe
from driftprobe.compare import pair
from driftprobe.local import bench
from driftprobe.matched import _projections
from driftprobe.payload import Payloads

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
FACTOR = 1.001
"""What the fault of filters.svg multiplies decode's scores with."""
RUNS: dict[str, dict[str, Any]] = {
    "clean": {},
    "layer": {"fault": "other_layer_cache"},
    "shift": {"fault": "cache_shift"},
    "rope": {"fault": "rope_plus_one"},
}
SECTIONS = {
    "depth-clean": ("clean", "depth-title"),
    "depth-fault": ("layer", "depth-title"),
    "ladder-clean": ("clean", "ladder-title"),
    "ladder-fault": ("layer", "ladder-title"),
    "arms-contents": ("shift", "arms-title"),
    "arms-computation": ("rope", "arms-title"),
    "rows-shift": ("shift", "rows-title"),
}
"""Picture -> the run that it is of, and the section of that run's report.html."""


def take_sections(runs: Path) -> None:
    """Write the PNG of each section, as report.html shows it at 900 pixels, light."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 900, "height": 900}, color_scheme="light")
        for name, (run, title) in SECTIONS.items():
            tab.goto((runs / run / "report.html").resolve().as_uri())
            tab.wait_for_selector("html[data-ready]")
            tab.locator(f'section[aria-labelledby="{title}"]').screenshot(path=str(PICTURES / f"{name}.png"))
        browser.close()


@dataclass(frozen=True)
class Share:
    """One tap's estimate: the share by which its scores move along themselves."""

    layer: int
    step: int
    share: float
    error: float
    """One standard error."""


def shares(run: Path) -> Iterator[Share]:
    """Yield the estimate of each layer and step of a run with whole tensors, those of equal scores left out."""
    (trace,) = load_traces(run)
    on = bench(trace, (pairs := pair(trace, "P", "D", Payloads(run / "traces")).matched), Payloads(run / "traces"))
    for item in pairs:
        record = item.reference
        if record.tensor == "attn_scores" and record.layer is not None and not item.drift.equal:
            for _, found in _projections((record.step, record.layer, record.tensor), on):
                spread = float((found.terms**2).sum()) ** 0.5
                yield Share(record.layer, record.step, float(found.terms.sum()) / found.weight, spread / found.weight)


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 300, 86, 34, 44
_HALF = 1.6 * (FACTOR - 1)
"""The axis goes from minus this to plus this."""


def draw_shares(clean: list[Share], fault: list[Share]) -> str:
    """Return filters.svg: every tap's share with a bar of one standard error, step after step, layer after layer."""
    plot = _HEIGHT - _TOP - _BOTTOM
    steps = 1 + max(share.step for share in clean + fault)
    columns = steps * (1 + max(share.layer for share in clean + fault))

    def y(value: float) -> float:
        return _TOP + plot * (0.5 - max(-1.0, min(1.0, value / _HALF)) / 2)

    def marks(found: list[Share], colour: str, shift: float) -> str:
        drawn = ""
        for one in found:
            x = _LEFT + (_WIDTH - _LEFT - 16) * (one.layer * steps + one.step + 0.5 + shift) / columns
            low, high = y(one.share - one.error), y(one.share + one.error)
            drawn += f'<path d="M{x:.1f} {low:.1f}V{high:.1f}"/><circle cx="{x:.1f}" cy="{y(one.share):.1f}" r="2.6"/>'
        return f'<g fill="{colour}" stroke="{colour}">{drawn}</g>'

    lines = "".join(
        f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - 16}" stroke="#99a3ad" stroke-dasharray="{dash}"/>'
        f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:+.1%}</text>'
        for value, dash in ((-(FACTOR - 1), "2 4"), (0.0, "0"), (FACTOR - 1, "2 4"))
    ).replace("+0.0%", "0")
    layers = "".join(
        f'<text x="{_LEFT + (_WIDTH - _LEFT - 16) * (layer + 0.5) * steps / columns:.1f}" y="{_HEIGHT - 22}" '
        f'text-anchor="middle">layer {layer}</text>'
        for layer in range(columns // steps)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{_LEFT}" y="20">share θ by which a tap\'s scores move along themselves: '
        '<tspan fill="#2b6cb0">no fault</tspan>, '
        f'<tspan fill="#b4371f">scores × {FACTOR:g}</tspan></text>'
        f'{lines}{layers}<text x="{_LEFT}" y="{_HEIGHT - 5}">within a layer: decode steps 0 to {steps - 1}</text>'
        f"{marks(clean, '#2b6cb0', -0.15)}{marks(fault, '#b4371f', 0.15)}</svg>\n"
    )


def main() -> None:
    """Run everything and write the pictures."""
    PICTURES.mkdir(exist_ok=True)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    for name, options in RUNS.items():
        if not (folder / name).exists():
            probe("builtin:tiny", mode="kv_aligned", steps=2, out=folder / name, **options)
    take_sections(folder)
    half = {"dtype": "float16", "mode": "kv_aligned", "ladder": "off", "payload": "all", "steps": 8}
    text = {"p": "The quick brown fox jumps over"}
    for name, options in (("half", {}), ("half_fault", {"fault": "attn_scale", "strength": FACTOR})):
        if not (folder / name).exists():
            probe("builtin:tiny", text, out=folder / name, **half, **options)
    picture = draw_shares(list(shares(folder / "half")), list(shares(folder / "half_fault")))
    (PICTURES / "filters.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
