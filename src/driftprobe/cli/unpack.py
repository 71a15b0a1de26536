"""driftprobe unpack: a folder's packed traces back to JSON Lines."""

from __future__ import annotations

from driftprobe.cli.turning import turning
from driftprobe.pack import unpack_folder

command = turning(
    "unpack", unpack_folder, "Turn every packed trace in FOLDER back into JSON Lines, in place, to the byte."
)
