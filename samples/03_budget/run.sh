#!/bin/sh
# Plans the demo's model for a measured speedup, carries the plan out, and compares.
# Needs: pip install 'depthcut[demo]', and what make demo leaves (or another depthcut export).
# Usage: run.sh [DEMO] [OUT] [SPEEDUP] [options of depthcut plan, such as --heal none]
set -eu
demo=${1:-out/demo}
out=${2:-out/budget}
speedup=${3:-1.15}
[ $# -le 3 ] && set -- || shift 3
mkdir -p "$out/candidate"

echo "== Which sublayers, and what in their places, for a request $speedup times as fast"
depthcut plan "$demo/importance.json" -o "$out/plan.json" --onnx "$demo/baseline" \
    --faster "$speedup" --at batch=1,prompt=512,new=64 \
    --time-budget 20s --config "$(dirname "$0")/search.yaml" "$@"

echo "== The plan carried out"
for file in config.json generation_config.json tokenizer.json tokenizer_config.json; do
    [ ! -f "$demo/baseline/$file" ] || cp "$demo/baseline/$file" "$out/candidate/"
done
depthcut prune "$demo/baseline/model.onnx" -o "$out/candidate/model.onnx" --plan "$out/plan.json"

echo "== Both compared"
depthcut compare "$demo/baseline" "$out/candidate" -o "$out/report" --prefill 512 --decode-past 512 --rounds 8 \
    --eval-tokens 4096
