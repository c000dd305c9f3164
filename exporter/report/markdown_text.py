"""Foreign text in Markdown, as GitHub, GitLab and the Hub read it: it says what it says.

It makes no link, picture, heading, code, HTML or mention of its own. URLs stay readable, and an
empty comment within keeps them from becoming links.
"""

from __future__ import annotations

import re
import urllib.parse

from exporter.printable import one_line

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


def escaped(text: str, *, own_marks: bool = False) -> str:
    """A text on one line.

    Args:
        text: It.
        own_marks: Words between backticks are code and those between asterisks stressed, as in a
            :class:`~exporter.report.parts.part.Note`.
    """
    line = one_line(" ".join(text.split()))
    told = (_OWN if own_marks else _FOREIGN).sub(_without_effect, line)
    block = _BLOCK.match(told)
    return f"{told[: block.end()]}\\{told[block.end() :]}" if block else told


def code(text: str) -> str:
    """A text as code within a line."""
    return f"`{one_line(' '.join(text.split())).replace('`', chr(39)) or ' '}`"


def fenced(text: str, language: str) -> list[str]:
    """The lines of a block of code, which nothing in it ends."""
    lines = [one_line(line) for line in text.split("\n")]
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *lines, fence]


def target(path: str) -> str:
    """Where a link leads that we make ourselves: a file beside the page."""
    return f"<{urllib.parse.quote(path, safe='/ .,+=@()[]', errors='backslashreplace')}>"


def _without_effect(found: re.Match[str]) -> str:
    kinds = {
        "mark": f"\\{found[0]}",
        "tag": "&lt;",
        "entity": "&amp;",
        "cut": f"{found[0]}<!-- -->",
    }
    return kinds.get(found.lastgroup or "", found[0])
