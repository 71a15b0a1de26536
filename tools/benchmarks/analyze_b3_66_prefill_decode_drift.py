#!/usr/bin/env python3
"""The seed report's own analyser: a thin door to `driftprobe analyze`.

--output names a folder for all reports, or a .md file for the analysis alone (its .tsv is written beside it).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from driftprobe.artifacts import write_reports
from driftprobe.cli.show import show
from driftprobe.errors import DriftprobeError
from driftprobe.result import analyze


def main() -> int:
    """Parse, analyse, write, and return the exit code of the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces-dir", type=Path, required=True)
    parser.add_argument("--mode", choices=["as_designed", "kv_aligned", "both"], default="both")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        result = analyze(options.traces_dir, mode=options.mode)
        if options.output.suffix == ".md":
            texts = result.reports()
            named = {
                options.output.name: texts["B3_66_V2_ANALYSIS.md"],
                options.output.with_suffix(".tsv").name: texts["B3_66_V2_ANALYSIS.tsv"],
            }
            write_reports(options.output.parent, named)
        else:
            result.write(options.output)
    except DriftprobeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    code = show(result, Console(highlight=False))
    print(f"  output:          {options.output}")
    return code


if __name__ == "__main__":
    sys.exit(main())
