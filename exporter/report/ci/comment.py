"""Markdown for a comment on a pull request: verdict, table, and the history in small.

The first line is a mark by which a later run finds its own comment and writes over it. It is a hash
of the model and of the candidate's name, so that several models, or cuts, have a comment each.
"""

from __future__ import annotations

from pathlib import PurePath

from exporter.files import sha256_bytes
from exporter.report.ci import Checked
from exporter.report.ci.github import summary

MARK = "<!-- depthcut check {} -->"
_COMMON = ("candidate", "candidate-quantized", "engines", "hf", "onnx")
"""Folders of every export: their names say nothing."""
_FILES = (".onnx", ".engine", ".plan")


def render(checked: Checked) -> str:
    """The whole comment."""
    found, path = checked.found, PurePath(checked.report.arms.candidate.path)
    name = _name(path)
    whose = f"{found.key.model} {name} {path.name}"
    mark = MARK.format(sha256_bytes(whose.encode())[:12])
    return f"{mark}\n{summary(found, f'depthcut check: {name}')}"


def _name(path: PurePath) -> str:
    """The innermost folder that tells one candidate from another; the path without one."""
    told = [part for part in path.parts if part not in _COMMON and not part.endswith(_FILES)]
    return told[-1] if told else str(path)
