"""What an export says at its start of its stages and their times."""

from __future__ import annotations

import pytest

from exporter.cli.export import export

pytest.importorskip("torch")

from exporter.choose.selection.affordable import SEARCH_S
from exporter.pipeline.outlook import Machine, expected_s

pytestmark = pytest.mark.torch

SMALL = Machine(parameters=10**8, layers=30, bytes=4 * 10**8, operations_per_s=1e11)
LARGE = Machine(parameters=10**9, layers=30, bytes=4 * 10**9, operations_per_s=1e11)


def expected(machine: Machine, *words: str) -> dict[str, float]:
    return expected_s(export.read(["model", "-o", "out", *words]).request, machine)


def test_the_stages_are_told_in_their_order() -> None:
    assert [*expected(SMALL)] == ["score", "choose", "heal", "export and cut", "measure"]
    assert [*expected(SMALL, "--drop-attn", "2", "--search", "one-shot", "--no-measure")] == [
        "score",
        "export and cut",
    ]
    timed = expected(SMALL, "--faster", "1.2x", "--time-budget", "10s")
    assert timed["time the sublayers"] == 80.0


def test_times_follow_the_model_and_what_is_asked_for() -> None:
    small, large, quick = expected(SMALL), expected(LARGE), expected(SMALL, "--quick")
    assert large["score"] == pytest.approx(10 * small["score"])
    assert large["choose"] == small["choose"] == SEARCH_S
    asked = ("--drop-attn", "2", "--search", "greedy")
    assert expected(LARGE, *asked)["choose"] == pytest.approx(
        10 * expected(SMALL, *asked)["choose"]
    )
    assert expected(SMALL, "--time", "3m")["heal"] == 180.0
    assert small["heal"] == 600.0
    assert sum(quick.values()) < sum(small.values()) / 3
    assert all(quick[stage] <= small[stage] for stage in quick)
