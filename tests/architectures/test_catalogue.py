"""The catalogue's own rules, and a handful of its rows; the whole of it is a command."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from graph_passes import Deletion
from tests.architectures.__main__ import PAGE, ROOT
from tests.architectures.catalogue import CATALOGUE
from tests.architectures.check import TOLERANCE, check
from tests.trials import Cells

TEXT = (ROOT / "graph_passes" / "docs" / "architectures.md").read_text(encoding="utf-8")
# Each has something that no other test of graphs from PyTorch has.
ROWS = (
    "qwen2_moe",  # shared experts
    "swin",  # windows, and a stream that changes its size
    "wav2vec2",  # a convolution before the first layer
    "t5 decoder",  # cross attention and its cache, two graphs
    "lfm2",  # mixers and their states, two graphs
)
TWO_GRAPHS = ("t5 decoder", "lfm2")
SHALLOW = {"qwen2_moe": {"num_hidden_layers": 2}, "t5 decoder": {"num_decoder_layers": 2}}
"""Layers are alike, and each takes PyTorch's exporter a second."""


def _cells() -> list[Cells]:
    return [cells for rows in PAGE.read(TEXT).values() for cells in rows]


def test_every_row_of_the_page_holds_or_says_why_not() -> None:
    assert [cells[0] for cells in _cells()] == [entry.name for entry in CATALOGUE]
    whole = [cells for cells in _cells() if cells[1]]
    assert all(float(cells[1]) <= TOLERANCE for cells in whole)
    others = [cells for cells in _cells() if not cells[1]]
    assert all(re.match(r"(refused|not exported): \w", cells[2]) for cells in others)
    named = {entry.name: entry.type_name for entry in CATALOGUE}
    assert len({named[cells[0]] for cells in whole}) >= 40


def test_the_page_tells_of_a_thousand_random_sets_and_no_wrong_model() -> None:
    match = re.search(r"(\d+) of them random sets, (\d+) wrong", TEXT)
    assert match is not None
    assert int(match.group(1)) >= 1000
    assert int(match.group(2)) == 0


def test_graph_passes_knows_no_architecture() -> None:
    words = {"seed", "clip"}  # which mean other things too
    names = {entry.type_name.partition("_")[0] for entry in CATALOGUE} - words
    spelled = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, sorted(names)))})(?![a-z])", re.I)
    result = [
        (path.name, match.group())
        for path in sorted((ROOT / "graph_passes").glob("*.py"))
        for match in spelled.finditer(_code(path))
    ]
    assert result == []
    assert spelled.search('if "llama" in name: pass')


def _code(path: Path) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [item for item in body if not _is_text(item)]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


SLOW = ("qwen2_moe", "swin", "wav2vec2")
"""What takes ten seconds or more: `make test-long`, and `make architectures`."""


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] if n in (*TWO_GRAPHS, *SLOW) else []) for n in ROWS],
)
def test_cuts_of_an_architecture_equal_pytorch(name: str, tmp_path: Path) -> None:
    (entry,) = [entry for entry in CATALOGUE if entry.name == name]
    shallow = replace(entry, settings={**entry.settings, **SHALLOW.get(name, {})})
    row = check(shallow, tmp_path, random_sets=2)
    assert row.wrong == []
    assert row.cuts >= row.sublayers + 3
    assert row.worst_error <= TOLERANCE


@pytest.mark.torch
def test_a_wrong_cut_of_an_architecture_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The surgery cuts the layer after the one that it is told to."""

    def off_by_one(layer: int, kind: str) -> Deletion:
        return Deletion((layer + 1) % 3, kind)  # type: ignore[arg-type]

    monkeypatch.setattr("tests.architectures.check.Deletion", off_by_one)
    monkeypatch.setattr("tests.architectures.check._check_report", lambda *_: None)
    (entry,) = [entry for entry in CATALOGUE if entry.name == "vit"]
    row = check(entry, tmp_path, random_sets=0)
    # Only those of one whole kind are the same.
    assert len(row.wrong) == row.kinds * 3
