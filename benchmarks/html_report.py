"""Size and load time of report.html for models of 4, 32 and 126 layers. Run: `python -m benchmarks.html_report`.

Each model is a small Llama with random weights and narrow layers: what the page holds depends on how many layers, taps,
prompts and modes there are, hardly on their width. Every run has both modes, the three built-in prompts' lengths and,
unless `--ladder off` is given, the float64 rung; `--fault` plants one. The load time is from navigation to the page's
last picture, in a Chromium at 1280 × 900 pixels, the median of three.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import driftprobe

LENGTHS = (2, 16, 32)
LOADS = 3


def small_llama(layers: int) -> object:
    """Return a Llama of random weights: 32 channels, 4 heads, 2 of them for keys and values."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make(layers: int, folder: Path, steps: int, ladder: str, fault: str | None) -> Path:
    """Run the whole experiment into a folder and return its page."""
    prompts = {f"len_{n}": [(7 * i + 3) % 256 for i in range(n)] for n in LENGTHS}
    driftprobe.probe(small_llama(layers), prompts, steps=steps, ladder=ladder, fault=fault, out=folder)
    return folder / "report.html"


def load_seconds(page: Path, chromium: str) -> float:
    """Return the median time from navigation to the last picture, in seconds."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        times = []
        for _ in range(LOADS):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            started = time.perf_counter()
            tab.goto(page.resolve().as_uri())
            tab.wait_for_selector("html[data-ready]")
            times.append(time.perf_counter() - started)
            tab.close()
        browser.close()
    return statistics.median(times)


def main() -> None:
    """Print one line a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32, 126])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--ladder", default="auto")
    parser.add_argument("--fault", default=None)
    parser.add_argument("--keep", type=Path, default=Path("build/html_report"), help="where runs go; used again")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    print("layers  steps  bytes      load (s)  render (s)")
    for layers in options.layers:
        folder = options.keep / f"{layers}_{options.steps}_{options.ladder}_{options.fault}"
        page = folder / "report.html"
        if not page.exists():
            make(layers, folder, options.steps, options.ladder, options.fault)
        result = driftprobe.analyze(folder)
        started = time.perf_counter()
        page.write_text(result.reports()["report.html"], encoding="utf-8", newline="\n")
        render = time.perf_counter() - started
        load = f"{load_seconds(page, chromium):.2f}" if chromium else "no browser"
        print(f"{layers:>6}  {options.steps:>5}  {page.stat().st_size:>9,}  {load:>8}  {render:>10.1f}")


if __name__ == "__main__":
    main()
