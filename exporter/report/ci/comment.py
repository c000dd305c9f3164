"""Markdown for a comment on a pull request: verdict, table, and the history in small.

The first line is a mark by which a later run finds its own comment and writes over it; it names the
model, so that several models in one run have a comment each.
"""

from __future__ import annotations

from exporter.report.ci import Checked
from exporter.report.ci.github import summary

MARK = "<!-- depthcut check {} -->"


def render(checked: Checked) -> str:
    """The whole comment."""
    found, candidate = checked.found, checked.report.arms.candidate
    mark = MARK.format(found.key.model[:12])
    name = " ".join(candidate.path.split("/")[-2:-1]) or candidate.path
    return f"{mark}\n{summary(found, f'depthcut check: {name}')}"
