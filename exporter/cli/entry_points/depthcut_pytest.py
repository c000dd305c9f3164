"""A pytest plugin: the fixture ``depthcut``, so that a team's own tests are the gate.

    def test_pruned_model(depthcut):
        comparison = depthcut.compare("baseline/", "candidate/")
        comparison.assert_speedup(1.1)
        comparison.assert_perplexity_increase("5%")

pytest loads it wherever depthcut is installed: until the fixture is used it imports nothing of it,
so that a project with packages of its own called `exporter` or `graph_passes` runs its tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from exporter.cli.pytest_fixture import Depthcut


class DepthcutWarning(UserWarning):
    """A measurement can't tell whether a limit holds, or other tests ran beside it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--depthcut-*`` and the ini options of the same names."""
    group = parser.getgroup("depthcut", "depthcut: latency and accuracy of models")
    group.addoption(
        "--depthcut-inconclusive",
        choices=("fail", "skip", "warn"),
        help="What to do if the measurement can't decide a check; default: fail.",
    )
    group.addoption(
        "--depthcut-time-budget",
        type=float,
        metavar="SECONDS",
        help="Maximum time of one comparison.",
    )
    group.addoption(
        "--depthcut-confirm",
        type=int,
        metavar="N",
        help="Repeat the measurement up to N times before reporting a slowdown; default: 1.",
    )
    parser.addini("depthcut_inconclusive", "fail, skip or warn", default="fail")
    parser.addini("depthcut_time_budget", "seconds that one comparison may measure", default="")
    parser.addini("depthcut_confirm", "measurements before a regression is believed", default="1")


@pytest.fixture
def depthcut(request: pytest.FixtureRequest) -> Depthcut:
    """Compares models and asserts what the comparison says."""
    from depthcut_packages import hidden_by

    problem = hidden_by()
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    from exporter.cli.pytest_fixture import Depthcut, Settings

    return Depthcut(request.node, Settings.of(request.config))
