"""The documentation as a site: built without a warning, read and searched without a network."""

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stderr
    return folder / "out"


def test_it_begins_at_the_readme(site: Path) -> None:
    assert "url=README.html" in (site / "index.html").read_text("utf-8")
    assert 'id="demo"' in (site / "README.html").read_text("utf-8")


def test_every_command_and_every_file_is_described(site: Path) -> None:
    commands = (site / "exporter/docs/commands.html").read_text("utf-8")
    for command, option in [("prune", "drop"), ("plan", "faster")]:
        assert f'id="cmdoption-depthcut-{command}-{option}"' in commands
    assert 'id="cmdoption-depthcut-plan-arg-shortlist"' in commands
    files = (site / "exporter/docs/files.html").read_text("utf-8")
    assert all(f'id="{kind}"' in files for kind in ("comparison-report", "cost-table", "engine"))


def test_the_search_knows_options_and_fields(site: Path) -> None:
    index = (site / "searchindex.js").read_text("utf-8")
    assert "renumber" in index
    assert "verdict_interv" in index


def test_a_page_loads_nothing_from_a_network(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > 30
    assert {
        str(page): loaded for page in pages if (loaded := foreign(page.read_text("utf-8")))
    } == {}
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"url\([\"']?(https?:)?//", style) for style in styles)


def foreign(page: str) -> list[str]:
    """What a browser would fetch from elsewhere."""
    pattern = r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"((?:https?:)?//[^\"]+)"
    return re.findall(pattern, page)


def test_what_would_be_fetched_would_be_found() -> None:
    assert foreign('<p><a href="https://a"></a><script src="https://b/c.js">') == ["https://b/c.js"]
    assert foreign('<link rel="stylesheet" href="//d/e.css">') == ["//d/e.css"]


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    built = build(tmp_path, "-b", "dummy", "-D", "include_patterns=README.md")  # and no page else
    assert built.returncode != 0
    assert "myst.xref_missing" in built.stderr
