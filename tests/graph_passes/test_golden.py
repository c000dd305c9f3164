"""A few pruned graphs as text, so that a change of the output shows in a diff."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = {
    path.name: text
    for path, text in runpy.run_path(str(GOLDEN / "regenerate.py"))["golden_texts"]()
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_graph_is_the_golden_one(name: str) -> None:
    assert TEXTS[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_no_golden_graph_is_left_over() -> None:
    assert {path.name for path in GOLDEN.glob("*.txt")} == set(TEXTS)
