"""What an export says at its start of its stages and their times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_families import tiny_loaded

from exporter.cli.export import export

pytest.importorskip("torch")

from exporter.choose.selection.affordable import SEARCH_S
from exporter.heal import automatic
from exporter.pipeline import outlook
from exporter.pipeline.outlook import Machine, by_stage, expected_s, say_outlook
from exporter.pipeline.pace import Pace
from tests.heard import Heard
from tests.raising import tells

pytestmark = pytest.mark.torch

SMALL = Machine(parameters=10**8, layers=30, bytes=4 * 10**8, operations_per_s=1e11)
LARGE = Machine(parameters=10**9, layers=30, bytes=4 * 10**9, operations_per_s=1e11)


def expected(machine: Machine, *words: str) -> dict[str, float]:
    return expected_s(export.read(["model", "-o", "out", *words]).request, machine)


def test_the_stages_are_told_in_their_order() -> None:
    stages = ["score", "time the sublayers", "choose", "heal", "export and cut", "measure"]
    assert [*expected(SMALL)] == stages
    assert [*expected(SMALL, "--target", "tensorrt", "--no-measure")] == [
        stage for stage in stages if stage not in ("time the sublayers", "measure")
    ]
    assert [*expected(SMALL, "--drop-attn", "2", "--search", "one-shot", "--no-measure")] == [
        "score",
        "export and cut",
    ]
    timed = expected(SMALL, "--faster", "1.2x", "--time-budget", "20s")
    assert timed["time the sublayers"] == 80.0
    weighed = expected(SMALL, "--faster", "1.2x", "--time-budget", "20s", "--heal", "best")
    assert weighed["time the sublayers"] == 160.0
    # Two rounds of a long prompt take their time, however little is asked for.
    short = expected(SMALL, "--faster", "1.2x", "--time-budget", "1s")
    assert 4.0 < short["time the sublayers"] < 80.0
    # Where no speedup rests on the times, they need not be precise.
    assert (
        expected(SMALL)["time the sublayers"]
        == expected(SMALL, "--at-most", "5%")["time the sublayers"]
        < expected(SMALL, "--faster", "1.2x")["time the sublayers"]
    )


def test_times_follow_the_model_and_what_is_asked_for(tmp_path: Path) -> None:
    small, large, quick = expected(SMALL), expected(LARGE), expected(SMALL, "--quick")
    assert large["score"] == pytest.approx(10 * small["score"])
    assert large["choose"] == small["choose"] == SEARCH_S
    asked = ("--drop-attn", "2", "--search", "greedy")
    assert expected(LARGE, *asked)["choose"] == pytest.approx(
        10 * expected(SMALL, *asked)["choose"]
    )
    drops = ("--drop-attn", "2")
    assert expected(SMALL, "--time", "3m", *drops)["heal"] == 180.0
    assert expected(SMALL, *drops)["heal"] == 600.0
    few = tmp_path / "few.yaml"
    few.write_text("heal: distill\nheal_tokens: 10000\n", encoding="utf-8")
    told = expected(SMALL, *drops, "--config", str(few))["heal"]
    assert told == pytest.approx(8 * SMALL.run_s(10_000)), "it ends when its tokens do"
    assert told < 600.0
    both = small["time the sublayers"] + small["choose"] + small["heal"]
    assert both == 600.0, "without a number choosing and healing share the time"
    assert sum(quick.values()) < sum(small.values()) / 2
    assert all(quick[stage] <= small[stage] for stage in quick)


def test_the_time_that_is_left_is_told_again_where_a_stage_took_another() -> None:
    heard = Heard()
    pace = Pace({"score": {"score": 20.0}, "plan": {"choose": 100.0}, "measure": {"measure": 60.0}})
    assert pace.left_s == 180.0
    pace.ended("score", 35.0, heard)
    assert not heard.lines, "15 s more are not worth a line"
    assert pace.left_s == pytest.approx(100 * 35 / 20 + 60)
    pace.ended("plan", 300.0, heard)
    assert len(heard.lines) == 1
    assert tells(heard.lines[0], "plan")
    assert tells(heard.lines[0], "60 s")
    pace.ended("measure", 600.0, heard)
    assert len(heard.lines) == 1, "nothing is left"


def test_what_was_there_already_or_not_told_corrects_nothing() -> None:
    heard = Heard()
    pace = Pace({"score": {"score": 20.0}, "plan": {"choose": 100.0}})
    pace.ended("score", None, heard)
    pace.ended("export", 1000.0, heard)
    assert pace.left_s == 100.0
    Pace().ended("plan", 1000.0, heard)
    assert not heard.lines


@pytest.mark.parametrize(
    ("asked", "stages"),
    [
        ((), {"score", "export", "plan", "prune", "measure"}),
        (("--drop-attn", "2"), {"score", "plan", "healing", "export", "prune", "measure"}),
    ],
)
def test_what_is_told_is_what_the_stages_make_up(asked: tuple[str, ...], stages: set[str]) -> None:
    request = export.read(["model", "-o", "out", *asked]).request
    told = expected_s(request, SMALL)
    parts = by_stage(request, told)
    assert {*parts} == stages
    assert sum(sum(each.values()) for each in parts.values()) == pytest.approx(sum(told.values()))


@pytest.mark.parametrize(("free", "folds"), [(1, True), (10**12, False)])
def test_what_can_not_be_trained_is_told_before_the_work_begins(
    monkeypatch: pytest.MonkeyPatch, free: int, folds: bool
) -> None:
    monkeypatch.setattr(automatic, "free_for_training", lambda _: free)
    heard = Heard()
    run: Any = SimpleNamespace(
        request=export.read(["model", "-o", "out"]).request,
        choosing=tiny_loaded("llama"),
        progress=heard,
    )
    say_outlook(run)
    assert any(line.startswith("heal:") for line in heard.lines) == folds
    assert any(tells(line, "--time") for line in heard.lines) != folds


@pytest.mark.parametrize(
    ("target", "found", "told"),
    [("portable", None, True), ("portable", "", False), ("onnxruntime-cpu", None, False)],
)
def test_a_form_that_an_extra_would_make_faster_is_told(
    monkeypatch: pytest.MonkeyPatch, target: str, found: Any, told: bool
) -> None:
    monkeypatch.setattr(outlook, "find_spec", lambda _: found)
    heard = Heard()
    request = export.read(["model", "-o", "out", "--drop-attn", "1", "--target", target]).request
    run: Any = SimpleNamespace(request=request, choosing=tiny_loaded("llama"), progress=heard)
    say_outlook(run)
    assert any(tells(line, "genai") for line in heard.lines) == told
