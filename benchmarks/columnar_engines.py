"""What reads a trace's records fastest: polars, duckdb, our scanner, and json.loads; JSONL and Parquet, in one run.

    python -m benchmarks.columnar_engines --records 100000

Each is a process of its own; seconds of processor time, all threads, without imports, least of three; peak memory.
An engine that is not installed is left out. None but ours looks for names that stand twice, or at the digest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.analysis_scale import Shape, write_trace
from driftprobe.columns import FLOATS, INTEGERS
from driftprobe.pack import pack_folder

_TEXTS = ("type", "prompt", "phase", "tensor", "hash", "arm", "dtype", "source")
_HEAD = """
import json, sys, time
from pathlib import Path
folder, columns, sketch = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "full"
(path,) = [path for path in folder.iterdir()]
"""
_TAIL = """
found = []
for _ in range(3):
    started = time.process_time()
    rows = read()
    found.append(time.process_time() - started)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
print(json.dumps([min(found), peak, rows]))
"""
READERS = {
    ("json.loads", ".jsonl"): """
def read():
    return len([json.loads(line) for line in path.open("rb")])
""",
    ("polars", ".jsonl"): """
import polars as pl
kinds = {"text": pl.String, "int": pl.Int64, "float": pl.Float64}
schema = {name: kinds[kind] for name, kind in columns.items()} | {"shape": pl.List(pl.Int64)}
schema |= {"sketch": pl.List(pl.Float64)} if sketch else {}
def read():
    return len(pl.read_ndjson(path, schema=schema))
""",
    ("duckdb", ".jsonl"): """
import duckdb
kinds = {"text": "VARCHAR", "int": "BIGINT", "float": "DOUBLE"}
schema = {name: kinds[kind] for name, kind in columns.items()} | {"shape": "BIGINT[]"}
schema |= {"sketch": "DOUBLE[]"} if sketch else {}
def read():
    source = f"read_json('{path}', columns={schema}, format='newline_delimited')"
    return duckdb.connect().execute(f"create table t as select * from {source}").fetchone()[0]
""",
    ("driftprobe", ".jsonl"): """
from driftprobe.scan import read_columns
def read():
    return len(read_columns(path).rows)
""",
    ("polars", ".parquet"): """
import polars as pl
def read():
    return len(pl.read_parquet(path))
""",
    ("duckdb", ".parquet"): """
import duckdb
def read():
    return duckdb.connect().execute(f"create table t as select * from '{path}'").fetchone()[0]
""",
    ("driftprobe", ".parquet"): """
from driftprobe.packed import packed_columns
def read():
    return len(packed_columns(path).rows)
""",
}


def measured(reader: str, folder: Path, kind: str) -> tuple[float, float] | None:
    """Return seconds and MB of one reader, or None where it is not installed or fails."""
    columns = (
        dict.fromkeys(_TEXTS, "text") | dict.fromkeys(("layer", *INTEGERS), "int") | dict.fromkeys(FLOATS, "float")
    )
    command = [sys.executable, "-c", _HEAD + reader + _TAIL, str(folder), json.dumps(columns), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    seconds, peak, _ = json.loads(done.stdout.splitlines()[-1])  # duckdb draws a bar before
    return seconds, peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=100_000)
    given = parser.parse_args()
    print("| records | file | reader | µs a record, processor | peak RSS MB |")
    print("|---|---|---|---|---|")
    for kind in ("lean", "full"):
        whole = Shape(32, 1, kind, 0.5)
        shape = Shape(32, max(1, round(given.records / whole.records)), kind, 0.5)
        with tempfile.TemporaryDirectory() as place:
            write_trace(Path(place), shape, "p0", 0)
            for ending in (".jsonl", ".parquet"):
                if ending == ".parquet":
                    pack_folder(Path(place))
                for (name, container), reader in READERS.items():
                    found = measured(reader, Path(place), kind) if container == ending else None
                    if found is not None:
                        each = found[0] / shape.records * 1e6
                        print(f"| {kind} | {ending} | {name} | {each:.2f} | {found[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
