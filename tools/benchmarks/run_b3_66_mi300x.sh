#!/usr/bin/env bash
# The seed report's own runner: run_b3_66_mi300x.sh NODE DATE MODE [more options of `driftprobe run`]
# NODE is `local`, or a machine as your ssh knows it, with driftprobe on its PATH (else --remote-command).
# MODE is as_designed, kv_aligned or both.
set -euo pipefail
if [ "$#" -lt 3 ]; then
    echo "usage: $0 NODE DATE MODE [options of driftprobe run]   e.g. $0 local 2026-02-07 kv_aligned" >&2
    exit 2
fi
node=$1 date=$2 mode=$3
shift 3
here=$(cd "$(dirname "$0")/../.." && pwd)
probe=$(command -v driftprobe || echo "$here/.venv/bin/driftprobe")
if [ ! -x "$probe" ]; then
    echo "error: driftprobe is not installed; run \`make demo\` in $here once, or pip install -e '.[hf]'" >&2
    exit 2
fi
if [ "$node" != local ]; then set -- --host "$node" "$@"; fi
exec "$probe" run --date "$date" --mode "$mode" "$@"
