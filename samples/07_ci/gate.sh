#!/bin/sh
# Holds a report against its limits, and against what earlier runs were.
#
#   sh gate.sh REPORT KEPT OUT
#
# REPORT is a report.json of depthcut compare or export. KEPT is a folder that the CI system keeps
# from run to run: baselines and the history. OUT takes what the CI system shows.
# MIN_SPEEDUP and MAX_PERPLEXITY_INCREASE are limits against the unpruned model, MAX_SLOWDOWN against
# the last accepted run. With ACCEPT=1 a run that passes becomes the baseline of its key.
# Exit code: 0 passed, 1 regression, 2 error, 3 inconclusive.
set -u
report=$1 kept=$2 out=$3
mkdir -p "$kept" "$out"

depthcut check "$report" --min-speedup "${MIN_SPEEDUP:-1.0}" \
  --max-perplexity-increase "${MAX_PERPLEXITY_INCREASE:-100%}" \
  --confirm "${CONFIRM:-1}" --junit "$out/limits.xml" --gitlab-metrics "$out/metrics.txt" \
  --bencher "$out/bencher.json" --github-benchmark "$out/github-benchmark"
code=$?

# The first run of a key has nothing to be held against.
if [ -f "$kept/baseline.json" ]; then
  depthcut check "$report" --baseline "$kept/baseline.json" \
    --max-slowdown "${MAX_SLOWDOWN:-3%}" --max-size-increase 1% --max-memory-increase 1% \
    --history "$kept/history.jsonl" --confirm "${CONFIRM:-1}" --junit "$out/baseline.xml"
  against=$?
  # An error is worse than a regression, a regression than not knowing.
  for worse in 3 1 2; do
    [ "$against" -eq "$worse" ] && worst=$worse
    [ "$code" -eq "$worse" ] && worst=$worse
  done
  code=${worst:-0}
fi

if [ "$code" -eq 0 ] && [ "${ACCEPT:-0}" = 1 ]; then
  depthcut check "$report" --baseline "$kept/baseline.json" --update-baseline \
    --history "$kept/history.jsonl" >/dev/null || exit 2
fi
exit "$code"
