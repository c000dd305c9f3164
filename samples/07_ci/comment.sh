#!/bin/sh
# Writes what the gate found as comments on the pull request or merge request.
#
#   sh comment.sh COMMENT.md...
#
# Each file begins with a mark; a comment that begins with it already is written over. On GitHub it
# needs gh with GH_TOKEN, and PULL_REQUEST, the number; on GitLab DEPTHCUT_COMMENT_TOKEN, a token
# with the scope api. The files come from a job that ran the request's own code: they are text here.
set -eu

on_github() {
  comments="repos/$GITHUB_REPOSITORY/issues"
  id=$(MARK=$2 gh api --paginate "$comments/$PULL_REQUEST/comments" \
    --jq '.[] | select(.body | startswith(env.MARK)) | .id' | head -n 1)
  if [ -n "$id" ]; then
    gh api --silent --method PATCH "$comments/comments/$id" -F "body=@$1"
  else
    gh api --silent --method POST "$comments/$PULL_REQUEST/comments" -F "body=@$1"
  fi
}

on_gitlab() {
  notes="$CI_API_V4_URL/projects/$CI_PROJECT_ID/merge_requests/$CI_MERGE_REQUEST_IID/notes"
  id='' page=1 found=''
  while [ -z "$id" ] && [ "$found" != "[]" ]; do
    found=$(curl -fsS -H "PRIVATE-TOKEN: $DEPTHCUT_COMMENT_TOKEN" \
      "$notes?per_page=100&page=$page")
    id=$(printf '%s' "$found" | MARK=$2 python3 -c 'import json, os, sys
found = [n["id"] for n in json.load(sys.stdin) if n["body"].startswith(os.environ["MARK"])]
print(*found[:1])')
    page=$((page + 1))
  done
  if [ -n "$id" ]; then method=PUT place=$notes/$id; else method=POST place=$notes; fi
  curl -fsS -o /dev/null -X "$method" -H "PRIVATE-TOKEN: $DEPTHCUT_COMMENT_TOKEN" \
    --data-urlencode "body@$1" "$place"
}

for file in "$@"; do
  mark=$(head -n 1 "$file")
  case $mark in
    "<!-- depthcut check "*" -->") ;;
    *) echo "comment.sh: $file is no comment of depthcut check." >&2; exit 2 ;;
  esac
  if [ "${GITHUB_ACTIONS:-}" = true ]; then on_github "$file" "$mark"; else on_gitlab "$file" "$mark"; fi
done
