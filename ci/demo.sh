#!/usr/bin/env bash
# Installs what the demo needs into .venv, then runs it: bash ci/demo.sh [ARGUMENTS OF lehr demo]
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/ci/setup.sh" export,cpu,text
exec "$root/.venv/bin/lehr" demo "$@"
