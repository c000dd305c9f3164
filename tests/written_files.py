"""The files of ONNX models that depthcut wrote: weights are named by what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_DATA = re.compile(r"(.+\.onnx)\.[0-9a-f]{16}\.data")


def data_of(model: Path) -> Path:
    """The one file that holds the weights of an ONNX file that depthcut wrote."""
    (path,) = all_data_of(model)
    return path


def all_data_of(model: Path) -> list[Path]:
    """Every file beside an ONNX file whose name says that it holds weights for it."""
    names = [(path, _DATA.fullmatch(path.name)) for path in model.parent.iterdir()]
    return sorted(path for path, name in names if name and name[1] == model.name)


def plain(name: str) -> str:
    """A file's name or path with ``*`` in place of the hash that names weights."""
    return _DATA.sub(r"\1.*.data", name)


def names_in(folder: Path) -> list[str]:
    """The names of all that is in a folder, sorted, as :func:`plain` says them."""
    return sorted(plain(path.name) for path in folder.iterdir())


def in_file(folder: Path, words: Iterable[str]) -> list[str]:
    """The words of a call; those that are lines of YAML, such as ``opset: 20``, go into a file."""
    words, path = list(words), folder / "keys.yaml"
    lines = [word for word in words if re.match(r"\w+: ", word)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [
        *(word for word in words if word not in lines),
        *(["--config", str(path)] * bool(lines)),
    ]
