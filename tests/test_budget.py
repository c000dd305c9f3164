"""The house: within tests/budget.toml, and errors held by class, code and fields alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import exporter.errors
import graph_passes.errors
from tests.budget import PACKAGES, ROOT, budget, counted, is_loose, is_over


def test_nothing_is_over_the_budget() -> None:
    allowed = budget()
    assert [f"{n} = {c}" for n, c in counted().items() if is_over(n, c, allowed.get(n, 0))] == []


def test_the_budget_is_close_to_what_is_there() -> None:
    """``python -m tests.budget --lower`` lowers it."""
    counts = counted()
    loose = [n for n, a in budget().items() if n not in counts or is_loose(n, counts[n], a)]
    assert loose == []


def test_no_package_stands_beside_those_that_are_counted() -> None:
    beside = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert beside <= set(PACKAGES)


TESTS = Path(__file__).parent
HELD = (
    "graph_passes",
    *(
        f"exporter/{room}"
        for room in (
            *("artifacts", "checkpoint", "choose", "cli", "compare", "cut", "engines", "export"),
            *("gate", "heal", "models", "pipeline", "quantize", "report", "score"),
        )
    ),
)
"""Folders whose tests are held to it."""
SENTENCE = re.compile(r"(?<![\w'./$-])[A-Za-z][a-z']*(?:,? [a-z']+){2,}(?![\w./-])")
"""Three or more plain words in a row."""
OURS = frozenset(
    name
    for module in (exporter.errors, graph_passes.errors)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, exporter.errors.DepthcutError)
)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """What expects an error, by the name that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("pytest.raises", "pytest.warns", "raises", "ends_in"):
                yield name, node


def texts(nodes: list[ast.expr]) -> Iterator[str]:
    """The strings in some expressions."""
    for expression in nodes:
        for node in ast.walk(expression):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def sentences(source: str) -> Iterator[int]:
    """The lines that hold an error of ours by pattern, or any error by a sentence."""
    for name, call in calls(ast.parse(source)):
        patterns = [keyword.value for keyword in call.keywords if keyword.arg == "match"]
        if (patterns and name == "pytest.raises" and ast.unparse(call.args[0]) in OURS) or any(
            map(SENTENCE.search, texts([*patterns, *call.args[1:]]))
        ):
            yield call.lineno


@pytest.mark.parametrize("folder", HELD)
def test_errors_are_held_by_codes_and_fields(folder: str) -> None:
    files = sorted((TESTS / folder).rglob("*.py"))
    assert files
    result = [f"{path}:{line}" for path in files for line in sentences(path.read_text("utf-8"))]
    assert result == []


@pytest.mark.parametrize(
    ("line", "held"),
    [
        ('with raises(PlanError, "rank-out-of-range", 3): pass', True),
        ('with pytest.raises(ValueError, match="Q4_1"): pass', True),
        ('with pytest.raises(PlanError, match="rank"): pass', False),
        ("with pytest.raises(PlanError, match=told): pass", False),
        ('with pytest.raises(ValueError, match="the rank is out of range"): pass', False),
        ('with raises(PlanError, "", "is out of range"): pass', False),
    ],
)
def test_what_counts_as_held(line: str, held: bool) -> None:
    assert (list(sentences(line)) == []) == held
