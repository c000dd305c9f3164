"""What depthcut wrote, said and asks for, as tests read it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_type_hints

from exporter.options import Options
from exporter.progress import Quiet

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


class Heard(Quiet):
    """Keeps every line, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    @property
    def reused(self) -> list[str]:
        """The stages that were not run again."""
        return [line.partition(":")[0] for line in self.lines if "reused, nothing" in line]


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
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        ["sh", "-c", call], cwd=folder, env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Reads a page and refuses elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title", "desc"} & set(self._open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def leaves_of(kind: type, begin: str = "") -> Iterator[str]:
    """The options of a class and of its parts."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        result = [hints[field.name], *get_args(hints[field.name])]
        parts = [one for one in result if isinstance(one, type) and issubclass(one, Options)]
        if parts:
            yield from leaves_of(parts[0], f"{begin}{field.name}.")
        else:
            yield begin + field.name
