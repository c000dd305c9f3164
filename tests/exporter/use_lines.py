"""Runs the lines that a file such as USE.md shows, in its folder, as they stand there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_CODE = r"(?:(?!^(?:\*\*|## )).)*?^```\w+$\n(?P<text>.*?)^```$"
_LED = re.compile(r"^\*\*(?P<library>[^\n]+?):\*\*" + _CODE, re.M | re.S)
_BLOCK = re.compile(r"^## (?P<library>[^\n]+?)$" + _CODE, re.M | re.S)


def lines_of(text: str) -> dict[str, str]:
    """The blocks of code of such a file, or of a card, by the libraries that they are for."""
    pattern = _LED if _LED.search(text) else _BLOCK
    return {item["library"].replace("\\", ""): item["text"] for item in pattern.finditer(text)}


def run_lines(text: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Runs lines of Python in a folder."""
    variables: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(text, "USE.md", "exec"), variables)
    return printed.getvalue(), variables


def run_shell(text: str, folder: Path) -> str:
    """Runs lines for a shell in a folder, with the depthcut of this tree; gives what it prints."""
    call = f'depthcut() {{ "{sys.executable}" -m exporter.cli "$@"; }}\nset -e\n{text}'
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        ["sh", "-c", call], cwd=folder, env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout
