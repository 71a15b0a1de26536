"""What is done on the node: short scripts for a POSIX shell. Their values come in front of them as quoted variables."""

from __future__ import annotations

import shlex

NO_FOLDER, NO_ARCHIVE, LOCKED, ALIVE, GONE = 73, 74, 75, 76, 71
"""Exit codes: the run's folder or archive is gone or cannot be made; tar or digest failed; another run holds the node;
something did not end; the run ended without an exit code."""


def script(body: str, **values: str | int) -> str:
    """Return a script with its values as shell variables; nothing of them is read by a shell as words."""
    return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in values.items()) + body


_LIVES = """
stamp() {
  if [ -d /proc/self ]; then
    set -- $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null)
    [ $# -lt 20 ] || [ "$1" = Z ] || printf '%s_%s' "$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)" "${20}"
  else
    case $(ps -o stat= -p "$1" 2>/dev/null) in ''|Z*) ;; *) ps -o lstart= -p "$1" | tr -s ' ' _;; esac
  fi
}
lives() { [ -n "$1" ] && [ -n "$2" ] && [ "$(stamp "$1")" = "$2" ]; }
ours() { lives "$(cat pid 2>/dev/null)" "$(cat stamp 2>/dev/null)"; }
"""
"""A process is known by its id and its start (and boot): an id alone may belong to somebody else's by now."""

PREPARE = """
given=$base
base=${base:-$HOME/.driftprobe}
mkdir -p "$base/runs" && base=$(cd "$base" && pwd) || exit 73
for try in 1 2 3; do
  [ -d "$base/lock" ] && { cat "$base/lock/holder" 2>/dev/null; exit 75; }
  mkdir -p "$base/runs"
  ln -s "$id $holder" "$base/lock" 2>/dev/null && break
  held=$(readlink "$base/lock") || continue
  [ "${held%% *}" = "$id" ] && break
  printf '%s\\n' "$held"; exit 75
done
held=$(readlink "$base/lock"); [ "${held%% *}" = "$id" ] || exit 73
mkdir "$base/runs/$id" 2>/dev/null && printf '%s\\n' "$id" > "$base/runs/$id/made-by-driftprobe"
printf '%s\\n' "$base/runs/$id"
"""
"""The lock is a link to nowhere whose text is the id and the holder: it is made with its content in one step."""

START = (
    _LIVES
    + """
cd "$dir" || exit 73
[ -f started ] && exit 0
: > started; : > log
[ -z "$prompts" ] || printf '%s' "$prompts" > prompts.json
run="trap '' HUP; ($command) ; echo \\$? > exit.part; mv exit.part exit"
own=; if command -v setsid >/dev/null; then own=setsid; else set -m; fi
$own sh -c "$run" >> log 2>&1 < /dev/null &
p=$!; stamp "$p" > stamp; echo "$p" > pid
"""
)
FOLLOW = (
    _LIVES
    + """
cd "$dir" || exit 73
n=$heard
while :; do
  over=; [ -f exit ] && over=yes
  if [ -z "$over" ] && ! ours; then sleep 1; over=gone; [ -f exit ] && over=yes; fi
  size=$(wc -c < log); size=$((size))
  if [ "$size" -gt "$n" ]; then tail -c +$((n + 1)) log | head -c $((size - n)) || exit 0; n=$size; fi
  case $over in yes) exit 0;; gone) exit 71;; esac
  sleep 0.2
done
"""
)
PACK = """
cd "$dir" || exit 73
code=$(cat exit 2>/dev/null || echo 71)
from=out/$date/$name; [ -d "$from/traces" ] || from=out/$date/.$name.partial
if [ ! -f artifacts.tar ] && [ -d "$from" ]; then
  set --; for part in traces run; do [ -d "$from/$part" ] && set -- "$@" "$part"; done
  if [ $# -gt 0 ]; then tar -C "$from" -cf artifacts.part "$@" && mv artifacts.part artifacts.tar || exit 74; fi
fi
if [ -f artifacts.tar ]; then
  size=$(wc -c < artifacts.tar)
  digest=$( (sha256sum artifacts.tar || shasum -a 256 artifacts.tar) | cut -c 1-64)
  [ -n "$digest" ] || exit 74
  printf '%s %s %s\\n' "$code" "$((size))" "$digest"
else printf '%s 0 none\\n' "$code"; fi
"""
FETCH = """
cd "$dir" || exit 73
[ -f artifacts.tar ] || { echo "$dir/artifacts.tar is gone" >&2; exit 73; }
tail -c +$((have + 1)) artifacts.tar
"""
END = (
    _LIVES
    + """
cd "$dir" 2>/dev/null && [ "$(cat made-by-driftprobe)" = "$id" ] && [ ! -f exit ] && ours || exit 0
p=$(cat pid)
table() {
  if [ -d /proc/self ]; then cat /proc/[0-9]*/stat 2>/dev/null | sed 's/ (.*) [A-Za-z] / /'
  else ps -A -o pid= -o ppid=; fi
}
below='{up[$1]=$2} END {for (a in up) {n=0; for (b=a; b != root && (b in up) && n < 999; n++) b=up[b]
  if (b == root) print a}}'
mine=
for q in $p $(table | awk -v root="$p" "$below"); do mine="$mine $q:$(stamp "$q")"; done
still() { for m in $mine; do lives "${m%%:*}" "${m#*:}" && return 0; done; return 1; }
kill -s TERM -- "-$p" 2>/dev/null || kill -s TERM "$p" 2>/dev/null
i=0; while still && [ "$i" -lt "$patience" ]; do sleep 0.2; i=$((i + 1)); done
still || exit 0
for m in $mine; do lives "${m%%:*}" "${m#*:}" && kill -s KILL "${m%%:*}" 2>/dev/null; done
i=0; while still && [ "$i" -lt 10 ]; do sleep 0.2; i=$((i + 1)); done
still || exit 0
for m in $mine; do lives "${m%%:*}" "${m#*:}" && echo "process ${m%%:*} did not end" >&2; done
exit 76
"""
)
"""TERM to the run's group, which lets driftprobe end the program of its engine; what lives after `patience` fifths of a
second, of all that the run had started, is killed."""

RELEASE = """
base=$(dirname "$(dirname "$dir")")
held=$(readlink "$base/lock"); [ "${held%% *}" = "$id" ] && rm -f "$base/lock"
exit 0
"""
CLEAN = """
[ "$(cat "$dir/made-by-driftprobe" 2>/dev/null)" = "$id" ] && rm -rf "$dir"
""" + RELEASE.replace("exit 0", 'rmdir "$base/runs" 2>/dev/null; [ -n "$given" ] || rmdir "$base" 2>/dev/null\nexit 0')
"""The run's own folder, the lock, and the folders around them where they are empty; one that the user named stays."""
