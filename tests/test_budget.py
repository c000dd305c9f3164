"""The house stays within tests/budget.toml, and the budget close to the house."""

from __future__ import annotations

import pytest

from tests.budget import PACKAGES, ROOT, budget, counted, is_loose, is_over, lowered

TOML = """\
[lines]
exporter = 1000
"exporter/cli" = 100
"exporter/gone" = 7
[files]
exporter_mean_lines = 150
"""


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


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"lines.exporter": 900}, "exporter = 909"),
        ({"lines.exporter": 990}, "exporter = 1000"),
        ({"lines.exporter": 1100}, "exporter = 1000"),
        ({"lines.exporter/cli": 20}, '"exporter/cli" = 20'),
        ({"files.exporter_mean_lines": 170.5}, "exporter_mean_lines = 163"),
        ({"files.exporter_mean_lines": 140.0}, "exporter_mean_lines = 150"),
    ],
)
def test_lowering_raises_nothing(counts: dict[str, float], line: str) -> None:
    lines = lowered(TOML, counts).splitlines()
    assert line in lines
    assert '"exporter/gone" = 7' not in lines


@pytest.mark.parametrize(
    ("name", "count", "allowed", "over", "loose"),
    [
        ("lines.exporter", 1001, 1000, True, False),
        ("lines.exporter", 1000, 1000, False, False),
        ("lines.exporter", 900, 1000, False, True),
        ("options.prune", 5, 6, False, False),
        ("files.exporter_longest_lines", 404, 800, False, False),
        ("files.exporter_longest_lines", 801, 800, True, False),
        ("files.exporter_longest_lines", 404, 404, False, True),
        ("files.exporter_mean_lines", 149.0, 150, True, False),
        ("files.exporter_mean_lines", 170.0, 150, False, True),
    ],
)
def test_what_is_over_and_what_is_loose(
    name: str, count: float, allowed: float, over: bool, loose: bool
) -> None:
    assert (is_over(name, count, allowed), is_loose(name, count, allowed)) == (over, loose)
