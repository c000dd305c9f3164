#!/bin/sh
# Holds a report against its limits, and against what earlier runs were.
#
#   sh gate.sh REPORT KEPT OUT
#
# REPORT is a report.json of depthcut compare or export. KEPT is a folder that the CI system keeps
# from run to run: the last accepted report (baseline.json) and the history. OUT takes what the CI system shows.
# MIN_SPEEDUP and MAX_PERPLEXITY_INCREASE are limits against the unpruned model, MAX_SLOWDOWN and
# MAX_PERPLEXITY_GROWTH against the last accepted run. With ACCEPT=1 a run that passes becomes the
# baseline. AGAIN is options of depthcut compare, such as "--rounds 48 --threads 2": with
# it, a regression must show twice. They are those of the first comparison; its models are the folders
# baseline and candidate beside the report, or BASELINE and CANDIDATE. Nothing that it names is run.
# Exit code: 0 passed, 1 regression, 2 error, 3 inconclusive.
set -u
report=$1 kept=$2 out=$3
mkdir -p "$kept" "$out"
# What an earlier call left must not be shown as this one's.
rm -f "$out/comment.md" "$out/limits.xml" "$out/limits.md" "$out/baseline.xml" "$out/baseline.md"

depthcut check "$report" --min-speedup "${MIN_SPEEDUP:-1.0}" \
  --max-perplexity-increase "${MAX_PERPLEXITY_INCREASE:-10%}" \
  --junit "$out/limits.xml" --comment "$out/limits.md" \
  --github-benchmark "$out/github-benchmark"
code=$?
against=0

# The first run has nothing to be held against.
if [ -f "$kept/baseline.json" ]; then
  depthcut check "$report" --baseline "$kept/baseline.json" \
    --max-slowdown "${MAX_SLOWDOWN:-3%}" --max-size-increase 1% --max-memory-increase 1% \
    --max-perplexity-increase "${MAX_PERPLEXITY_GROWTH:-1%}" \
    --history "$kept/history.jsonl" --junit "$out/baseline.xml" \
    --comment "$out/baseline.md"
  against=$?
fi

# An error is worse than a regression, a regression than not knowing. A check that was killed or
# isn't there ends with a code of its own: an error, too.
worst=0
for each in "$code" "$against"; do
  case $each in
    0) ;;
    1) [ "$worst" -eq 2 ] || worst=1 ;;
    3) [ "$worst" -ne 0 ] || worst=3 ;;
    *) worst=2 ;;
  esac
done
code=$worst

# One comment has both checks; its first line, the same in both, says which comment it is.
for each in limits baseline; do
  [ -f "$out/$each.md" ] || continue
  if [ -f "$out/comment.md" ]; then
    { echo; tail -n +2 "$out/$each.md"; } >> "$out/comment.md"
  else
    cp "$out/$each.md" "$out/comment.md"
  fi
done
if [ "$code" -eq 2 ] && [ -f "$out/comment.md" ]; then
  printf '\n**A check ended with an error; the log of the job shows it.**\n' >> "$out/comment.md"
fi

if [ "$code" -eq 1 ] && [ -n "${AGAIN:-}" ]; then
  built=$(dirname "$report")
  rm -rf "$out/again"
  depthcut compare "${BASELINE:-$built/baseline}" "${CANDIDATE:-$built/candidate}" \
    -o "$out/again" $AGAIN && python3 - "$report" "$out/again/report.json" <<'END'
import json, sys

def measured(path):
    report = json.load(open(path))
    sides, text = report["arms"], report.get("accuracy") or {}
    shapes = [[row.get(k) for k in ("phase", "batch", "sequence_length", "past_length")] for row in report["latency"]]
    models = [sides[side]["sha256"] for side in ("baseline", "candidate")]
    return models, shapes, report["environment"]["threads"], text.get("text_sha256"), text.get("tokens")

sys.exit(measured(sys.argv[1]) != measured(sys.argv[2]))
END
  if [ $? -ne 0 ]; then
    echo "gate.sh: AGAIN needs the options of the first comparison, and its models in BASELINE and CANDIDATE" >&2
    exit 2
  fi
  AGAIN='' sh "$0" "$out/again/report.json" "$kept" "$out"
  code=$?
  printf '\n**Compared twice: the first comparison said regression.**\n' >> "$out/comment.md"
  exit "$code"
fi

if [ "$code" -eq 0 ] && [ "${ACCEPT:-0}" = 1 ]; then
  depthcut check "$report" --baseline "$kept/baseline.json" --update-baseline \
    --history "$kept/history.jsonl" --no-github >/dev/null || exit 2
fi
exit "$code"
