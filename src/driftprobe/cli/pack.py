"""driftprobe pack: a folder's traces from JSON Lines to Parquet."""

from __future__ import annotations

from driftprobe.cli.turning import turning
from driftprobe.pack import pack_folder

command = turning(
    "pack",
    pack_folder,
    "Turn every trace in FOLDER from JSON Lines into Parquet, in place. `driftprobe unpack` gives every byte back.",
)
