"""Export for a budget: planned on the exported graph, kept, and refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import _request, _walk, checkpoint, own_cache

from exporter.artifacts import HealingReport, PruneReport, PruningPlan, Speedup
from exporter.choose.budgets.budget import Budget, Floors
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.selection.search_options import SearchOptions
from exporter.errors import OptionError, PlanError, UnmetGoalError, UsageError
from exporter.heal.options import HealOptions
from exporter.pipeline.request import DropRequest
from tests.raising import raises

pytestmark = pytest.mark.torch

__all__ = ["checkpoint", "own_cache"]  # fixtures

AT = RequestShape(batch=1, prompt=8, new=2)


def _asked(checkpoint: Path, out: Path, budget: Budget, heal: Any = "bias") -> Any:
    healing = None if heal == "none" else HealOptions(kind=heal)
    return _request(checkpoint, out, drops=DropRequest(budget), heal=healing)


@pytest.fixture
def made_times(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every sublayer saves a tenth of a request; the graphs that this is asked of."""
    from exporter.choose.budgets.target_speedup import Stopwatch
    from tests.made_tables import made_table

    graphs: list[Path] = []

    def costs(self: Any, replacements: Any) -> Any:
        graphs.append(self.onnx)
        names: Any = [(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]
        return made_table({n: dict.fromkeys(replacements, 10.0) for n in names}, at=AT)

    def speedup(self: Any, walk: Any) -> Speedup:
        ratio = 100 / (100 - 10 * len(walk.choices))
        return Speedup(ratio=ratio, ci95=(ratio, ratio))

    monkeypatch.setattr(Stopwatch, "costs", costs)
    monkeypatch.setattr(Stopwatch, "speedup", speedup)
    return graphs


@pytest.mark.long
def test_a_plan_is_timed_on_the_baseline_and_healed(
    checkpoint: Path,
    tmp_path: Path,
    made_times: list[Path],
) -> None:
    out = tmp_path / "out"
    report, _ = _walk(_asked(checkpoint, out, Budget(target_speedup=1.25, at=AT)))
    plan = PruningPlan.read(out / "plan.json")
    assert plan.budget["target_speedup"] == 1.25
    assert plan.predicted["measured_speedup"] == pytest.approx(1.25, rel=0.03)
    assert [d.replacement for d in plan.deletions] == ["bias"] * 2
    assert (out / "plan.safetensors").is_file()
    assert report.healing == HealingReport.read(out / "plan.report.json").healing
    assert [branch.replacement for branch in report.healing.branches] == ["bias"] * 2
    assert PruneReport.read(out / "prune.json").verification.passed is True
    assert [graph.name for graph in made_times] == ["model.onnx"]
    assert all(check.passed for check in report.parity)
    _, heard = _walk(_asked(checkpoint, out, Budget(target_speedup=1.25, at=AT)))
    assert set(heard.reused) >= {"score", "export", "plan", "prune", "measure"}
    before = (out / "plan.json").read_bytes()
    with raises(PlanError, "out-of-reach", "99.0 %"):
        _walk(_asked(checkpoint, out, Budget(parameters=0.99), "none"))
    assert (out / "plan.json").read_bytes() == before


def test_tensorrt_is_refused_where_times_are_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    result = _asked(checkpoint, tmp_path / "out", Budget(floors=Floors(0.05), at=AT))
    with raises(OptionError) as refused:
        replace(result, target="tensorrt")
    assert refused.value.keys[0] == "at"


def test_a_search_without_damage_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    result = _asked(checkpoint, tmp_path / "out", Budget(parameters=0.1))
    with raises(UsageError, "needs-measured-damage", "--search"):
        replace(result, search=SearchOptions(search="one-shot"))
    assert replace(result, search=SearchOptions(search="greedy")).search.by_damage


def test_one_way_of_saying_what_to_drop() -> None:
    with raises(OptionError) as refused:
        DropRequest(Budget(attention=1), Path("plan.json"))
    assert refused.value.keys == ("plan",)


def test_the_largest_cut_that_keeps_its_quality_is_cut_with_its_healed_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    heal = HealOptions(kind="fold", samples=12, sequence_length=16)
    result = _request(
        checkpoint, out, drops=DropRequest(Budget(floors=Floors(0.5))), heal=heal,
        search=SearchOptions(search="auto"),
    )  # fmt: skip
    report, _ = _walk(result)
    plan = PruningPlan.read(out / "plan.json")
    assert plan.tried[-1].holds
    assert plan.changed_weights > 0
    assert report.healing == HealingReport.read(out / "plan.report.json").healing
    assert all(check.passed for check in report.parity)
    assert PruneReport.read(out / "prune.json").verification.passed is True
    _, heard = _walk(result)
    assert set(heard.reused) >= {"score", "export", "plan", "prune", "measure"}
    before = (out / "plan.json").read_bytes()
    never = replace(result, drops=DropRequest(Budget(floors=Floors(1e-12, 0.999999))))
    # Times decide which cuts are tried: one that changes nothing may leave it undecided.
    for request in (never, replace(never, out=tmp_path / "other")):
        with pytest.raises(UnmetGoalError) as refused:
            _walk(request)
        assert refused.value.code.endswith("nothing-within-limits")
    assert (out / "plan.json").read_bytes() == before
    assert {path.name for path in (tmp_path / "other").iterdir()} == {".depthcut"}


def test_without_a_number_the_cut_is_trained_checked_and_compared(
    checkpoint: Path, tmp_path: Path, made_times: list[Path]
) -> None:
    """What `depthcut export MODEL -o out` does, with fewer tokens."""
    from exporter.cli.export import export

    out = tmp_path / "out"
    result = export.read([str(checkpoint), "-o", str(out), "--at-most", "90%", "--at", str(AT)])
    usual, tiny = result.request, _request(checkpoint, out)
    assert usual.heal is not None
    heal = replace(
        usual.heal, tokens=12 * 64, step_tokens=64, sequence_length=16, samples=24, time_s=3600.0
    )
    report, heard = _walk(replace(usual, heal=heal, score=tiny.score, compare=tiny.compare))
    plan = PruningPlan.read(out / "plan.json")
    assert plan.tried[0].healed_by == "distill"
    assert plan.tried[0].training_seconds > 0
    assert plan.tried[-1].holds
    assert plan.budget["at"] == str(AT)
    assert plan.predicted["speedup"] > 1
    assert plan.changed_weights > 0
    assert report.healing is not None
    assert report.healing.training is not None
    assert [graph.name for graph in made_times] == ["model.onnx"]
    assert all(check.passed for check in report.parity)
    assert PruneReport.read(out / "prune.json").verification.passed is True
    assert any("more" in line and "time" in line for line in heard.lines), "what more time gives"
