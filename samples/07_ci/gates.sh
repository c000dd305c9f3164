#!/bin/sh
# Holds the reports of one model or several against their limits, each as gate.sh does.
#
#   sh gates.sh KEPT OUT REPORT...
#
# KEPT and the settings are those of gate.sh. OUT takes a folder for each report, named by the
# report's own folder. Exit code: the worst of gate.sh's.
set -u
kept=$1 out=$2
shift 2
here=$(dirname "$0")
worst=0
for report in "$@"; do
  name=$(basename "$(dirname "$report")")
  [ ! -e "$out/$name" ] || name=$name-$(find "$out" -mindepth 1 -maxdepth 1 | wc -l)
  sh "$here/gate.sh" "$report" "$kept" "$out/$name"
  case $? in
    0) ;;
    1) [ "$worst" -eq 2 ] || worst=1 ;;
    3) [ "$worst" -ne 0 ] || worst=3 ;;
    *) worst=2 ;;
  esac
done
exit "$worst"
