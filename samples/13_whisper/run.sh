#!/bin/sh
# Drops sublayers of Whisper's decoder, and judges both models by their word error rates.
# Needs: pip install 'depthcut[speech]'
# Usage: run.sh MODEL SCORED JUDGED [OUT] [what to drop, as depthcut export takes it]
# SCORED and JUDGED are folders of recordings, or JSON lines: {"audio": "one.wav", "text": "..."}
set -eu
model=$1 scored=$2 judged=$3
shift 3
out=out/whisper
[ $# -gt 0 ] && out=$1 && shift
[ $# -gt 0 ] || set -- --drop-joint 6 --protect encoder

echo "== $model, scored on $scored, judged on $judged"
depthcut export "$model" -o "$out" --calibration "$scored" --eval-text "$judged" --heal best "$@"

echo "== Answers of the cut model"
python "$(dirname "$0")/transcribe.py" "$out/candidate" "$judged"
