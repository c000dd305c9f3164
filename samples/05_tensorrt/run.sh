#!/bin/sh
# Builds TensorRT-RTX engines of a baseline and a candidate, ahead of time and without a GPU.
# Needs: pip install 'depthcut[cpu,rtx]', and what depthcut export leaves for any runtime (--target portable).
# Usage: run.sh [EXPORTED] [OUT] [CARDS] [options of depthcut build, such as --prompt-range 1:128:512]
set -eu
exported=${1:-out/portable}
out=${2:-out/tensorrt}
cards=${3:-sm80,sm89,sm120}
[ $# -le 3 ] && set -- || shift 3

for arm in baseline candidate; do
    echo "== $arm: an engine for prefill and one for decode"
    depthcut build "$exported/$arm/model.onnx" -o "$out/$arm" --split --compute-capability "$cards" "$@"
    for file in tokenizer.json tokenizer_config.json config.json generation_config.json; do
        if [ -f "$exported/$arm/$file" ]; then cp "$exported/$arm/$file" "$out/$arm/"; fi
    done
done

echo "== What the records beside the engines say"
python - "$out" <<'PY'
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/*.engine.json")):
    record = json.loads(path.read_text())
    print(
        f"{record['engine']}: {record['engine_bytes'] / 1e6:.1f} MB, "
        f"{sum(record['layers'].values())} layers of {record['network_layers']}, "
        f"sublayers cut: {len(record['plan'])}, sha256 {record['engine_sha256'][:12]}"
    )
PY

if [ -n "$(python -c 'from exporter.engines.build.libraries import ask_driver; print(ask_driver().problem)')" ]
then
    echo "Built, not run: no GPU that could run engines. Copy $out to a machine with one."
else
    echo "== The candidate's engines continue a text"
    depthcut generate "$out/candidate" "The capital of France is"
    echo "== Both, measured"
    depthcut compare "$out/baseline" "$out/candidate" -o "$out/report" \
        --engine-onnx "$exported/baseline/model.onnx" "$exported/candidate/model.onnx"
fi
