"""Take docs/report.png, the map in report.html of a run with a planted fault.

driftprobe run --fault other_layer_cache --steps 4 --name layer
python tools/report_picture.py artifacts/DATE/layer/report.html docs/report.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def take(page: Path, picture: Path) -> None:
    """Write the page's map section as a PNG."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1240, "height": 900}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("html[data-ready]")
        box = tab.locator("#pictures > section").first.bounding_box()
        assert box is not None, "the page has a map"
        clip = {"x": box["x"] - 16, "y": box["y"] - 12, "width": box["width"] + 32, "height": box["height"] + 16}
        tab.screenshot(path=str(picture), clip=clip, full_page=True)
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
