#!/bin/sh
# Holds the reports of one model or several against their limits, each as gate.sh does.
#
#   sh gates.sh KEPT OUT REPORT...
#
# The settings are those of gate.sh. KEPT and OUT take a folder for each report, named by the report's
# own folder; of two folders with one name, the later one's gets the report's number too. Two cuts of
# one model have the same key, so they can't share a baseline. Exit code: the worst of gate.sh's.
set -u
kept=$1 out=$2
shift 2
here=$(dirname "$0")
worst=0 number=0 taken=/

for report in "$@"; do
  number=$((number + 1))
  name=$(basename "$(dirname "$(realpath "$report")")")
  case $name in . | /) name=report ;; esac
  while case $taken in *"/$name/"*) ;; *) false ;; esac; do name=$name-$number; done
  taken=$taken$name/
  sh "$here/gate.sh" "$report" "$kept/$name" "$out/$name"
  case $? in
    0) ;;
    1) [ "$worst" -eq 2 ] || worst=1 ;;
    3) [ "$worst" -ne 0 ] || worst=3 ;;
    *) worst=2 ;;
  esac
done
exit "$worst"
