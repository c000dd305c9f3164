"""Markdown for a comment on a pull request: verdict, table, and the history in small.

The first line is a mark by which a later run finds its own comment and writes over it. It is a hash
of the model and of the candidate's folder, so that several models, or cuts, have a comment each.
"""

from __future__ import annotations

from pathlib import PurePath

from exporter.files import sha256_bytes
from exporter.report.ci import Checked
from exporter.report.ci.github import summary

MARK = "<!-- depthcut check {} -->"
_COMMON_FOLDERS = ("candidate", "onnx")
"""Names that say nothing: each export has a candidate."""


def render(checked: Checked) -> str:
    """The whole comment."""
    found, name = checked.found, _name(checked.report.arms.candidate.path)
    mark = MARK.format(sha256_bytes(f"{found.key.model} {name}".encode())[:12])
    return f"{mark}\n{summary(found, f'depthcut check: {name}')}"


def _name(path: str) -> str:
    """The innermost folder that tells one candidate from another; the path without one."""
    folders = [part for part in PurePath(path).parts[:-1] if part not in _COMMON_FOLDERS]
    return folders[-1] if folders else path
