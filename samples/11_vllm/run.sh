#!/bin/sh
# Drops attentions that vLLM can do without, and writes the folder that vLLM loads.
# Needs: pip install 'depthcut[torch]' (for a GGUF file, the extra gguf too); for the answer vLLM.
# Usage: [VLLM=ENV/bin/python] run.sh MODEL [OUT] [what to drop, as depthcut plan takes it]
set -eu
model=$1
out=${2:-out/vllm}
[ $# -gt 1 ] && shift
shift
[ $# -gt 0 ] || set -- --drop-attn 8
python=${VLLM:-python}

mkdir -p "$out"
echo "== Scoring $model"
depthcut score "$model" --metric cosine -o "$out/importance.json"
depthcut plan "$out/importance.json" "$@" --for vllm -o "$out/plan.json"
depthcut checkpoint "$model" "$out/plan.json" --as decilm --for vllm -o "$out/served"

if "$python" -c 'import vllm' 2>/dev/null; then
    echo "== $out/served in vLLM"
    "$python" "$(dirname "$0")/answer.py" "$out/served"
else
    echo "vLLM is not installed; serve the folder with: vllm serve $out/served --trust-remote-code"
fi
