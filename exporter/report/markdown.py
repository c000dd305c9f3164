"""Documents as Markdown, as GitHub, GitLab and the Hub read it."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator

from exporter.printable import one_line, printable
from exporter.report.sections.blocks import (
    Block,
    Bullets,
    Cell,
    Command,
    Document,
    Grid,
    Intervals,
    Link,
    Note,
    Section,
    Sign,
)

_INTERVAL = r"\[[-+.\d, %x]*\](?![(\[:])"
_INLINE = rf"""
    (?P<whole>{_INTERVAL})                                # ours, and no link
  | (?P<mark>[\\`*~$|\[\]] | (?<![A-Za-z0-9])_ | _(?![A-Za-z0-9]))
  | (?P<tag><)
  | (?P<entity>&(?=\#?\w+;))
  | (?P<cut>(?<=\w:)(?=//) | (?i:\bwww)(?=\.) | @(?=\w))
"""
_FOREIGN = re.compile(_INLINE, re.VERBOSE)
_OWN = re.compile(
    r"(?P<own>(?<!`)`[^`]+`(?!`) | (?<![\w*])\*[\w\ ]+\*(?![\w*])) |" + _INLINE, re.VERBOSE
)
_BLOCK = re.compile(r"\d{1,9}(?=[.)](?:\s|$))|(?=>|#{1,6}(?:\s|$)|[-+]\s|[-=]{2,}$)")
"""What would begin a heading, a quotation, a list or a rule."""


def markdown(document: Document) -> str:
    """A whole document: its result first, then its sections. Charts are left out."""
    lines = [
        f"# depthcut {document.command}: {escaped(document.title)}",
        "",
        escaped(document.lead),
    ]
    if document.notices:
        lines += ["", *(f"- {escaped(notice)}" for notice in document.notices)]
    written = [section_markdown(section) for section in document.sections if section.blocks]
    return printable("\n\n".join(["\n".join(lines), *written]) + "\n")


def section_markdown(section: Section) -> str:
    """One section: its heading and its blocks. Captions stand where there are several tables."""
    several = sum(isinstance(block, Grid) for block in section.blocks) > 1
    lines = [f"## {escaped(section.title)}"]
    for block in section.blocks:
        if isinstance(block, Intervals):
            continue
        if several and isinstance(block, Grid):
            lines += ["", f"{escaped(block.caption)}:"]
        lines += ["", *_block(block)]
    return "\n".join(lines)


def table_lines(grid: Grid) -> list[str]:
    """A table of GitHub's."""
    rule = ["---:" if column in grid.right else "---" for column in range(len(grid.header))]
    rows = [grid.header, *grid.rows]
    names = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return [names[0], "| " + " | ".join(rule) + " |", *names[1:]]


def _block(block: Block) -> Iterator[str]:
    match block:
        case Grid():
            yield from table_lines(block)
        case Note(text, lead):
            result = escaped(text, own_marks=True)
            yield f"**{escaped(lead)}** {result}" if lead else result
        case Bullets(lines):
            yield from (f"- {escaped(line, own_marks=True)}" for line in lines)
        case Command(text, language):
            yield from fenced(text, language)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"[{escaped(cell.word)}]({_target(cell.target)})"
    return f"**{escaped(cell.word)}**" if isinstance(cell, Sign) else escaped(cell)


def escaped(text: str, *, own_marks: bool = False) -> str:
    """A text on one line."""
    line = one_line(" ".join(text.split()))
    result = (_OWN if own_marks else _FOREIGN).sub(_without_effect, line)
    block = _BLOCK.match(result)
    return f"{result[: block.end()]}\\{result[block.end() :]}" if block else result


def code(text: str) -> str:
    """A text as code within a line."""
    return f"`{one_line(' '.join(text.split())).replace('`', chr(39)) or ' '}`"


def fenced(text: str, language: str) -> list[str]:
    """The lines of a block of code, which nothing in it ends."""
    lines = [one_line(line) for line in text.split("\n")]
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *lines, fence]


def _target(path: str) -> str:
    """Where a link leads that we make ourselves: a file beside the page."""
    return f"<{urllib.parse.quote(path, safe='/ .,+=@()[]', errors='backslashreplace')}>"


def _without_effect(match: re.Match[str]) -> str:
    kinds = {
        "mark": f"\\{match[0]}",
        "tag": "&lt;",
        "entity": "&amp;",
        "cut": f"{match[0]}<!-- -->",
    }
    return kinds.get(match.lastgroup or "", match[0])
