#!/usr/bin/env bash
# The seed report's own runner: run_b3_66_mi300x.sh NODE DATE MODE [more options of `driftprobe run`]
# NODE is `local` here; other nodes come with the remote runner. MODE is as_designed, kv_aligned or both.
set -euo pipefail
if [ "$#" -lt 3 ]; then
    echo "usage: $0 NODE DATE MODE [options of driftprobe run]   e.g. $0 local 2026-02-07 kv_aligned" >&2
    exit 2
fi
node=$1 date=$2 mode=$3
shift 3
if [ "$node" != local ]; then
    cat >&2 <<MSG
error: only the local node can be used
  where:    NODE
  measured: $node
  allowed:  local
  next:     run this script on that machine with NODE=local; other nodes come with the remote runner
MSG
    exit 2
fi
here=$(cd "$(dirname "$0")/../.." && pwd)
probe=$(command -v driftprobe || echo "$here/.venv/bin/driftprobe")
if [ ! -x "$probe" ]; then
    echo "error: driftprobe is not installed; run \`make demo\` in $here once, or pip install 'driftprobe[hf]'" >&2
    exit 2
fi
exec "$probe" run --date "$date" --mode "$mode" "$@"
