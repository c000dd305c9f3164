"""What kind of file stands in a result's place: only one of its own kind is replaced."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from graph_passes.errors import UsageError

ONNX, GGUF, HTML, TEXT = "ONNX file", "GGUF file", "HTML page", "text"
_JSON, _OTHER = "JSON", "binary file"
_HEAD_BYTES = 4096
_OURS = re.compile(r'\{\s*"schema_version":\s*\d+,\s*"kind":\s*"(\w+)"')
_BEGINNINGS = {b"\x1f\x8b": "gzip archive", b"PK\x03\x04": "zip archive", b"GGUF": GGUF}
_ONNX = re.compile(rb"\x08[\x01-\x7f][\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2]")
"""The version, and the tag of a further field of a model."""


def kind_of(path: Path) -> str:
    """A word for a regular file's kind, by its beginning; empty for anything else.

    A file of depthcut's stages has the word that it calls itself by, such as ``pruning_plan``.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return ""
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:  # who reads or writes it will tell
        return ""
    return _kind(head) if head else ""


def _kind(head: bytes) -> str:
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if _ONNX.match(head):
        return ONNX
    if head[8:9] == b"{" and not any(head[5:8]):
        return "safetensors file"
    return _kind_of_text(head) or _OTHER


def _kind_of_text(head: bytes) -> str | None:
    try:
        text = head.decode().lstrip()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the last letter is cut in two
            return None
        text = head[: error.start].decode().lstrip()
    if any(letter < " " and letter not in "\t\n\r\f\x1b" for letter in text):
        return None
    if ours := _OURS.match(text):
        return ours[1]
    if text.startswith(("{", "[")):
        return _JSON
    return HTML if text[:15].lower().startswith(("<!doctype html", "<html")) else TEXT


def refuse_foreign(path: Path, kind: str) -> None:
    """Refuses a result's place where a file of another kind stands."""
    result = kind_of(path)
    if kind and result and result != kind:
        raise UsageError(
            f"{path} is there and holds something else ({result.replace('_', ' ')}) than what is "
            f"to be written ({kind.replace('_', ' ')}).",
            "Write under another name, or remove that file.",
            code="foreign-file",
        )
