"""Text that strangers wrote, such as the names in a model's file, made safe to print."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

_ACTIVE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_COMMAND = re.compile(r"(^[^\S\n]*:):|(##\w*)\[", re.MULTILINE)
_KEPT = "\n\t"


def one_line(text: str) -> str:
    """A value, such as a name or an error's message: line breaks and tabs are escaped, too."""
    return _ACTIVE.sub(_escape, text)


def visible(text: str) -> str:
    """A document that no log shows, such as a page: line breaks and tabs stay."""
    return _ACTIVE.sub(_escape_but_breaks, text)


def printable(text: str) -> str:
    """Lines for a terminal or a log, or a document that a log may show."""
    return _COMMAND.sub(_without_command, visible(text))


def printable_line(text: str) -> str:
    """A value that stands in a line of its own."""
    return printable(one_line(text))


def printable_xml(root: Element) -> str:
    """An XML document: what is read of it is printable, and XML can write each character."""
    from xml.etree.ElementTree import indent, tostring  # only written here, never read

    for element in root.iter():
        element.text = element.text and printable(element.text)
        element.attrib = {name: printable_line(value) for name, value in element.attrib.items()}
    indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{tostring(root, "unicode")}\n'


def json_text(content: object, indent: int = 2) -> str:
    """An object as a file has it: other scripts as they are, what terminals act on escaped."""
    return printable_json(json.dumps(content, indent=indent, ensure_ascii=False)) + "\n"


def printable_json(text: str) -> str:
    """JSON, with escapes of JSON's own: the same data, and nothing that a terminal acts on.

    JSON itself escapes the control characters below 0x20, and no others.
    """
    escaped = _ACTIVE.sub(_json_escape, text)
    return re.sub(r"(##\w*)\[", r"\1\\u005b", escaped)


class Pieces:
    """Text that comes in pieces, whose lines begin anywhere in them."""

    def __init__(self) -> None:
        self._line = ""

    def add(self, piece: str) -> str:
        """The next piece, safe to print behind those before it."""
        text = self._line + piece
        result = printable(text)[len(printable(self._line)) :]
        self._line = text.rpartition("\n")[2]
        return result


class PrintableOutput:
    """A text stream whose writers are libraries: warnings, logs, tracebacks, bars."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw
        self._pieces = Pieces()

    def write(self, text: str) -> int:
        """Writes text; a bar may begin its line again."""
        again = text.startswith("\r")
        if again:
            self._pieces = Pieces()
        self.raw.write("\r" * again + self._pieces.add(text[again:]))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Writes several."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Lets nothing but printable text through what Python code prints during the block."""
    out, err = sys.stdout, sys.stderr
    with (
        contextlib.redirect_stdout(cast(TextIO, PrintableOutput(out))),
        contextlib.redirect_stderr(cast(TextIO, PrintableOutput(err))),
    ):
        yield


def raw_output(stream: TextIO) -> TextIO:
    """The stream below, for commands to a terminal or a CI system that are our own."""
    return stream.raw if isinstance(stream, PrintableOutput) else stream


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _escape_but_breaks(match: re.Match[str]) -> str:
    return match[0] if match[0] in _KEPT else _escape(match)


def _json_escape(match: re.Match[str]) -> str:
    return match[0] if match[0] in _KEPT else f"\\u{ord(match[0]):04x}"


def _without_command(match: re.Match[str]) -> str:
    return f"{match[1]}\\x3a" if match[1] else f"{match[2]}\\x5b"


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun: ``1 block``, ``2 blocks``, ``0 blocks``."""
    return f"{number:.12g} {noun if number == 1 else plural or noun + 's'}"


def are(number: float) -> str:
    """The verb behind such a number: ``is`` for one, ``are`` for any other."""
    return "is" if number == 1 else "are"


def percent(share: float) -> str:
    """``12.3 %``."""
    return f"{100 * share:.1f} %"


def milliseconds(value_ms: float) -> str:
    """Three significant digits."""
    return significant(value_ms, 3)


def significant(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, without an exponent where it can be read so.

    Zeros at the end stay, as ``1.50`` beside ``1.25``: they say how exact the number is. An exact
    zero is ``0``.
    """
    if value == 0:
        return "0"
    rounded = f"{value:.{digits - 1}e}"
    exponent = int(rounded.partition("e")[2]) if math.isfinite(value) else 0
    if not -3 <= exponent < 6:
        return rounded
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def relative_change(before: float, after: float) -> str:
    """Percent with a sign; nothing where there was nothing before."""
    if not before:
        return ""
    change = 100 * (after / before - 1)
    return f"{change:+.1f} %" if abs(change) < 1000 else f"x {after / before:,.0f}"
