#!/bin/sh
# Quantises a baseline and a candidate alike, and compares all four on ONNX Runtime.
# Needs: pip install 'depthcut[cpu]', and what make demo leaves (or another depthcut export).
# Usage: run.sh [DEMO] [OUT] [SCHEME] [options of depthcut compare, such as --rounds 6]
set -eu
demo=${1:-out/demo}
out=${2:-out/quantised}
scheme=${3:-int8}
[ $# -le 3 ] && set -- || shift 3

for arm in baseline candidate; do
    echo "== $arm in $scheme"
    depthcut quantize "$demo/$arm" -o "$out/$arm/model.onnx" --quantize "$scheme"
done

echo "== All four: whole and cut, in float and quantised"
depthcut compare "$out/baseline" "$out/candidate" -o "$out/report" \
    --float "$demo/baseline" "$demo/candidate" "$@"
