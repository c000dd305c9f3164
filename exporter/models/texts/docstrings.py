"""The docstrings of Python's standard library: a text that every Python carries."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
_SHORTEST = 80  # characters; shorter ones tell little
_KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def docstrings() -> tuple[str, ...]:
    """Each once, in the order of the files' names; those of tests are left out."""
    library, found = Path(sysconfig.get_path("stdlib")), dict[str, None]()
    for file in sorted(library.rglob("*.py")):
        if not _LEFT_OUT & set(file.relative_to(library).parts):
            found.update(dict.fromkeys(_docstrings_in(file)))
    return tuple(each for each in found if len(each) >= _SHORTEST)


def _docstrings_in(file: Path) -> Iterator[str]:
    """Those of one file; none where it is no Python of this version."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, _KINDS):
            yield ast.get_docstring(node) or ""
