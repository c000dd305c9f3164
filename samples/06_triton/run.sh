#!/bin/sh
# Packs an encoder for Triton and shows its config; serves it with Docker when told to.
# Needs: pip install 'depthcut[cpu]', and what samples/02_prune_any_onnx/encoder.sh leaves.
# Usage: run.sh [MODEL] [REPOSITORY]; MODEL is an ONNX file, a folder with model.onnx, or an engine
# of TensorRT; a decoder is refused.
set -eu
model=${1:-out/encoder/pruned.onnx}
repository=${2:-out/triton}
image=${TRITON:-nvcr.io/nvidia/tritonserver:26.10-py3}
device=${DEVICE:-cpu}

depthcut package "$model" --triton "$repository" --name encoder --device "$device"
echo "== What Triton is told"
cat "$repository/encoder/config.pbtxt"

gpus=""
[ "$device" = cpu ] || gpus="--gpus all "
set -- docker run --rm $gpus-p 8000:8000 -v "$(cd "$repository" && pwd):/models" "$image" \
    tritonserver --model-repository /models
echo "== Serve it"
echo "$@"
[ -z "${SERVE:-}" ] || exec "$@"
