#!/usr/bin/env bash
# The one command that must pass, here and on a build server: format, lint, types, layers, the device part, the release
# gate on the reference models, tests.
#
#   bash ci/check.sh            everything
#   bash ci/check.sh --fast     everything but the gate and the tests
#
# Every step runs, whatever the ones before it said. Exit codes: 0 all passed, 1 a step failed, 2 wrong usage, 6
# something must be installed.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

fast=
case "$*" in
  "") ;;
  --fast) fast=yes ;;
  *) printf 'check: unknown arguments: %s; expected --fast or nothing\n' "$*" >&2; exit 2 ;;
esac

bash ci/setup.sh export,cpu,dev
bin=$root/.venv/bin

# Tests run one at a time on small arrays: more threads than this only wait for each other. Waiting threads sleep,
# because ONNX Runtime's and OpenMP's pools live in one process here.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 4 ? cores : 4))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

failed=()
step() {
  local name=$1 started=$SECONDS outcome=passed
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" </dev/null || { outcome=FAILED; failed+=("$name"); }
  printf -- '-- %s %s in %d s\n' "$name" "$outcome" $((SECONDS - started))
}

step format "$bin/python" -m ruff format --check
step lint "$bin/python" -m ruff check
step types "$bin/python" -m mypy
step types-benchmarks "$bin/python" -m mypy benchmarks
# The same on Python 3.10, for what runs on a device: no tomllib, StrEnum or Self there.
step types-3.10 "$bin/python" -m mypy --python-version 3.10 -p lehr.runtime -p lehr.engines -p lehr.ci -p lehr.commands -m lehr.cli
step layers "$bin/lint-imports" --no-logo
step device bash ci/jetpack.sh
[ -n "$fast" ] || step gate bash ci/gate_reference_models.sh
# A worker a core, each with whole files, so that fixtures of a module are made once.
[ -n "$fast" ] || step tests env OMP_NUM_THREADS=1 "$bin/python" -m pytest -n "$OMP_NUM_THREADS" --dist loadfile

if [ ${#failed[@]} -gt 0 ]; then
  printf '\ncheck: failed: %s\n' "${failed[*]}"
  exit 1
fi
printf '\ncheck: all passed\n'
