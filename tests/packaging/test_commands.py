"""The documents' commands run on a tiny model; a block of commands that doesn't says why not.

The reason stands in a comment before the block, ``<!-- not run: why -->``, or for all blocks of a
page in one that says ``<!-- none is run: why -->``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_documents import ROOT, WRITTEN

PAGES = ROOT / "exporter" / "docs"
RUN = [ROOT / "README.md", *(PAGES / f"{name}.md" for name in ("exporting", "shipping", "reports"))]
"""Pages whose commands are run, one page after the other, in one folder, as the demo leaves it."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Every block of commands, and why it isn't run; empty where it is."""
    page = re.search(r"<!-- none is run: (.+?) -->", text, flags=re.DOTALL)
    pattern = r"(?:<!-- not run: ((?:(?!-->).)+) -->\n)?```sh\n(.*?)```"
    found = re.findall(pattern, text, flags=re.DOTALL)
    return [(block, why or (page[1] if page else "")) for why, block in found]


def calls(text: str) -> list[list[str]]:
    """The words of each call of depthcut that is to be run."""
    found = []
    for block, why in blocks(text):
        for line in [] if why else block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            assert words[:1] in ([], ["depthcut"]), f"only depthcut can be run here: {line}"
            found += [words[1:]] if words else []
    return found


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_is_run_or_says_why_not(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [block for block, why in blocks(text) if not why and path not in RUN] == []
    assert calls(text) or path not in RUN


def test_a_block_without_a_reason_would_be_found() -> None:
    text = "<!-- not run: long -->\n```sh\nmake demo\n```\n```sh\ndepthcut a  # b\n```\n"
    assert blocks(text) == [("make demo\n", "long"), ("depthcut a  # b\n", "")]
    assert calls(text) == [["a"]]
    assert blocks(f"<!-- none is run: GPU -->\n{text}")[1] == ("depthcut a  # b\n", "GPU")
    with pytest.raises(AssertionError):
        calls("```sh\nmake demo\n```")
