"""Write the tables of docs/faults.md from the faults themselves: `python tools/fault_table.py`."""

from __future__ import annotations

from pathlib import Path

from driftprobe.causes import CAUSES
from driftprobe.faults import FAULTS, Fault
from driftprobe.taps import place

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"
MARK = "<!-- what follows is written by tools/fault_table.py -->\n"
_HEAD = (
    "| fault | what it breaks | first tap | reading | cause | strengths |\n"
    "|---|---|---|---|---|---|\n"
)  # fmt: skip


def page(text: str) -> str:
    """Return the page's text with its tables made anew."""
    return text.partition(MARK)[0] + MARK + tables()


def tables() -> str:
    """Return a heading and a table for each family of faults, in the order in which they are listed."""
    families: dict[str, list[Fault]] = {}
    for fault in FAULTS.values():
        families.setdefault(fault.family or "the harness", []).append(fault)
    parts = (f"\n## {_title(name)}\n\n{_HEAD}{''.join(map(_row, found))}" for name, found in families.items())
    return "".join(parts)


def _title(family: str) -> str:
    return "MLP" if family == "mlp" else family[0].upper() + family[1:]


def _row(fault: Fault) -> str:
    tap = place(fault.layer, fault.tensor) if fault.tensor and fault.verdict == "MISMATCH" else "–"
    cause = f"`{fault.cause}`" if fault.cause in CAUSES else f"`{fault.verdict}`"
    strengths = "" if fault.strengths == (1.0,) else f"{', '.join(f'{s:g}' for s in fault.strengths)} {fault.unit}"
    cells = (f"`{fault.name}`", fault.breaks, tap, fault.reading, cause, strengths)
    return "| " + " | ".join(cell.replace("|", r"\|").strip() for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
