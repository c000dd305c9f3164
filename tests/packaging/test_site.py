"""The documentation as a site: built without a warning, read without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed")

ROOT = Path(__file__).parents[2]


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As `make docs` does it."""
    words = ["--fail-on-warning", "--keep-going", "--quiet", "-c", "exporter/docs/site", *options]
    words += ["-d", str(folder / "read"), ".", str(folder / "out")]
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_it_begins_at_a_page_lists_all_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    site = tmp_path / "out"
    begin = re.findall(r"url=([\w/.]+)", (site / "index.html").read_text("utf-8"))
    listed = re.findall(r"\]\((.+)\)", (site / "llms.txt").read_text("utf-8"))
    assert len(begin) == 1
    assert len(listed) > 30
    assert [name for name in [*begin, *listed] if not (site / name).is_file()] == []
    pages = {str(page): page.read_text("utf-8") for page in site.rglob("*.html")}
    assert len(pages) > 30
    assert {name: loaded for name, page in pages.items() if (loaded := foreign(page))} == {}


def foreign(page: str) -> list[str]:
    """What a browser would fetch from elsewhere."""
    pattern = r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]+)"
    return re.findall(pattern, page)


def test_what_would_be_fetched_would_be_found() -> None:
    assert foreign('<p><a href="https://a"></a><script src="https://b/c.js">') == ["https://b/c.js"]


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    built = build(tmp_path, "-b", "dummy", "-D", "include_patterns=README.md")  # and no page else
    assert built.returncode != 0
    assert "myst.xref_missing" in built.stderr
