#!/bin/sh
# Packs a model for Triton and shows its config; serves it with Docker when told to.
# Needs: pip install 'depthcut[cpu]', and what make demo leaves (or another depthcut export).
# Usage: run.sh [MODEL] [REPOSITORY]; MODEL is a folder with model.onnx, or an engine of TensorRT.
set -eu
model=${1:-out/demo/candidate}
repository=${2:-out/triton}
image=${TRITON:-nvcr.io/nvidia/tritonserver:25.08-py3}
device=${DEVICE:-cpu}

depthcut package "$model" --triton "$repository" --name smollm2 --device "$device"
echo "== What Triton is told"
cat "$repository/smollm2/config.pbtxt"

gpus=""
[ "$device" = cpu ] || gpus="--gpus all "
set -- docker run --rm $gpus-p 8000:8000 -v "$(cd "$repository" && pwd):/models" "$image" \
    tritonserver --model-repository /models
echo "== Serve it"
echo "$@"
[ -z "${SERVE:-}" ] || exec "$@"
