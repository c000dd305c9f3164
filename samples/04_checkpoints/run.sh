#!/bin/sh
# Trains a tiny model, follows its importance through the training, and prunes the last checkpoint
# at several depths.
# Needs: pip install 'depthcut[demo]'
# Usage: run.sh [OUT] [STEPS] [options of depthcut depths, such as --eval-text FILE]
set -eu
out=${1:-out/checkpoints}
steps=${2:-640}
[ $# -le 2 ] && set -- || shift 2
here=$(dirname "$0")

echo "== A training with checkpoints"
python "$here/train.py" "$out/run" --steps "$steps"

echo "== Importance at each of them, on one text"
mkdir -p "$out/scores"
for checkpoint in "$out"/run/checkpoint-*; do
    depthcut score "$checkpoint" -o "$out/scores/${checkpoint##*-}.json" --calibration pydoc \
        --samples 64 --sequence-length 64
done

echo "== How far the rankings agree, and all scores by layer and checkpoint"
(
    set --
    for name in $(ls "$out/scores" | sort -n); do set -- "$@" "$out/scores/$name"; done
    depthcut score --compare "$@" -o "$out/training.json"
)

echo "== The last one, pruned at several depths"
echo "eval_sequence_length: 64" > "$out/depths.yaml"
depthcut depths "$out/run/checkpoint-$steps" \
    --importance "$out/scores/$steps.json" -n 1,2,3,4 \
    -o "$out/depths.json" --eval-tokens 8192 --config "$out/depths.yaml" "$@"
