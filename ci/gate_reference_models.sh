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
models=(digits-dit digits-adm)
lehr() { "$root/.venv/bin/python" -m lehr "$@"; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Small models on small arrays: two processes side by side end sooner than one after the other on all cores.
cores=$(nproc)
export OMP_NUM_THREADS=$((cores < 4 ? 1 : cores / 2 < 4 ? cores / 2 : 4)) OMP_WAIT_POLICY=PASSIVE

gate() {
  local model=$1 bundle=$scratch/$1.lehr reports=()
  if [ -n "${LEHR_GATE_REPORTS:-}" ]; then
    mkdir -p "$LEHR_GATE_REPORTS"
    reports=(--report "$LEHR_GATE_REPORTS/$model" --junit "$LEHR_GATE_REPORTS/$model.xml")
  fi
  lehr export "$model" -o "$bundle" >/dev/null || return
  lehr build "$bundle" --target cpu --library onnxruntime --threads "$OMP_NUM_THREADS" >/dev/null || return
  lehr gate "$bundle" --policy "$policy" ${reports[@]+"${reports[@]}"}
}

processes=()
for model in "${models[@]}"; do
  gate "$model" >"$scratch/$model.log" 2>&1 &
  processes+=($!)
done
verdict=0
for k in "${!models[@]}"; do
  wait "${processes[k]}" || verdict=$?
  printf '\n-- %s\n' "${models[k]}"
  cat "$scratch/${models[k]}.log"
done
exit "$verdict"
