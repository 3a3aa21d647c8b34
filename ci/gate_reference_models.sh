#!/usr/bin/env bash
# Holds both reference models against the release policy, from export to verdict: what this project asks of its users.
#
#   bash ci/gate_reference_models.sh [POLICY]      POLICY: a shipped name or a file, release by default
#
# Needs .venv with the extras export and cpu. Where LEHR_GATE_REPORTS names a folder, reports are left in it, by model.
# Exit codes: 0 both pass, 1 one does not, otherwise the code of the verb that failed.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
policy=${1:-release}
lehr() { "$root/.venv/bin/python" -m lehr "$@"; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

verdict=0
for model in digits-dit digits-adm; do
  bundle=$scratch/$model.lehr
  reports=()
  if [ -n "${LEHR_GATE_REPORTS:-}" ]; then
    mkdir -p "$LEHR_GATE_REPORTS"
    reports=(--report "$LEHR_GATE_REPORTS/$model" --junit "$LEHR_GATE_REPORTS/$model.xml")
  fi
  lehr export "$model" -o "$bundle" >/dev/null
  lehr build "$bundle" --target cpu --library onnxruntime >/dev/null
  lehr gate "$bundle" --policy "$policy" ${reports[@]+"${reports[@]}"} || verdict=$?
done
exit "$verdict"
