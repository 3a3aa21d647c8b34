#!/usr/bin/env bash
# Makes .venv at the top of the clone and installs Lehr into it, editable, with the versions of constraints.txt.
#
#   bash ci/setup.sh [EXTRAS]        EXTRAS: comma-separated extras of pyproject.toml, export,cpu,dev by default
#
# Runs from any folder, with or without an active environment, and does nothing where nothing changed. Everything
# it says goes to stderr. Set PYTHON to choose the interpreter that .venv is made with.
#
# torch is the large part. From an index that has only the CUDA build, torch==2.13.0 brings several gigabytes; to get
# the CPU build, point pip at an index or a folder that holds it with PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or
# PIP_FIND_LINKS (or a pip configuration file): pip honours them here as everywhere.
#
# Exit codes: 0 done, 2 wrong usage, 6 something must be installed first.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/lehr-setup.stamp

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { local code=$1; shift; printf 'setup: %s\n' "$@" >&2; exit "$code"; }

# ------------------------------------------------------------------------------------------------- the wish

[ $# -le 1 ] || fail 2 "expected one argument, extras separated by commas, got: $*"
extras=${1:-export,cpu,dev}
[[ $extras =~ ^[a-z]+(,[a-z]+)*$ ]] || fail 2 "'$extras' is no list of extras; expected one such as export,cpu"

case "$(uname -s) $(uname -m)" in
  "Linux x86_64") ;;
  *) fail 6 "this is $(uname -s) $(uname -m); the versions in constraints.txt are checked on Linux x86_64 only." \
       "elsewhere, install by hand and without them: python -m pip install -e '$root[$extras]'" ;;
esac

# ------------------------------------------------------------------------------------------ the interpreter

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if [ -e "$venv/bin/python" ]; then
  new_enough "$venv/bin/python" || fail 6 "$venv does not hold a working Python 3.11 or newer." \
    "remove that folder and run this again."
else
  candidates=(python3.11 python3.12 python3.13 python3)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  chosen=
  for candidate in "${candidates[@]}"; do
    # A name on PATH may be a shim without an interpreter behind it, so run it.
    if new_enough "$candidate"; then chosen=$candidate; break; fi
  done
  [ -n "$chosen" ] || fail 6 "found no Python 3.11 or newer (tried: ${candidates[*]})." \
    "install one, or name it: PYTHON=/path/to/python3.11 bash ci/setup.sh"
  say "making $venv with $("$chosen" --version)"
  "$chosen" -m venv "$venv" >&2 || fail 6 "$chosen cannot make environments; on Debian and Ubuntu install python3-venv."
fi
python=$venv/bin/python
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >&2 || fail 6 \
  "$venv has no pip and this Python cannot add one; on Debian and Ubuntu install python3-venv, remove $venv, run again."

# ---------------------------------------------------------------------------------------------- the install

# The stamp's first line is what an install depends on, the second the extras installed under it.
key=$({ cat "$root/pyproject.toml" "$root/constraints.txt"; "$python" -VV; echo "$root"; } | sha256sum | cut -d ' ' -f 1)
installed=
if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$key" ]; then installed=$(sed -n 2p "$stamp"); fi

all=$installed
for extra in ${extras//,/ }; do
  case ",$all," in *",$extra,"*) ;; *) all=${all:+$all,}$extra ;; esac
done
if [ "$all" = "$installed" ]; then
  say "$venv is up to date ($extras)"
  exit 0
fi

say "installing lehr[$extras] into $venv"
rm -f "$stamp"
"$python" -m pip install --disable-pip-version-check --no-input --root-user-action=ignore \
  --constraint "$root/constraints.txt" --editable "$root[$extras]" >&2 </dev/null \
  || fail 6 "pip could not install lehr[$extras]; its reason stands above. Run this again once that is mended."
printf '%s\n%s\n' "$key" "$all" >"$stamp"
say "done"
