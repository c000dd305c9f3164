"""Counted figures beside times: in checks, in the history and in what CI systems are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import (
    Arm,
    Arms,
    CheckReport,
    ComparisonReport,
    EngineFacts,
    GraphWork,
    HistoryEntry,
)
from exporter.gate.gate import BaselineMatch, check, confirmed
from exporter.gate.history import append, entry_of
from exporter.gate.limits import Limits
from exporter.gate.request import CheckRequest, run_check
from exporter.report.checks import change_words, steps_of
from exporter.report.ci import annotation_lines, github_benchmark
from tests.made_reports import gate_arm, gate_report, gate_row

TIME = Limits(max_slowdown=0.03)


def work(**changes: Any) -> GraphWork:
    values: dict[str, Any] = {
        "nodes": {"Cast": 2, "MatMul": 40},
        "weight_bytes": 4000,
        "cache_bytes": 2000,
    }
    return GraphWork(**{**values, **changes})


def engine(layers: int, scratch: int) -> EngineFacts:
    return EngineFacts(
        path="e", sha256="9" * 64, engine_bytes=1, backend="tensorrt", backend_version="11",
        built_for="sm90", precision="fp32", network_layers=9, layers={"gemm": layers},
        memory_bytes={"activation": scratch}, build_s=1.0,
    )  # fmt: skip


def report(candidate: GraphWork | None, ms: float = 80.0, **changes: Any) -> ComparisonReport:
    arms = Arms(
        baseline=gate_arm("base", work=work()),
        candidate=gate_arm("cand", work=candidate, **changes),
    )
    return gate_report([gate_row(candidate_ms=ms)], arms=arms)


def against(new: ComparisonReport, old: ComparisonReport, limits: Limits = TIME) -> CheckReport:
    return check(new, limits, baseline=BaselineMatch(old))


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"nodes": {"Cast": 3, "MatMul": 40}}, "nodes"),
    ({"weight_bytes": 4001}, "weight_bytes"),
    ({"cache_bytes": 4000}, "cache_bytes"),
]


def test_nodes_have_a_limit_and_one_more_is_beyond_it() -> None:
    old, new = report(work()), report(work(nodes={"Cast": 3, "MatMul": 40}))
    for share, verdict in ((0.0, "regressed"), (2.0, "within_limit")):
        found = against(new, old, Limits(max_node_increase=share))
        (one,) = [each for each in found.checks if each.quantity == "nodes"]
        assert one.verdict == verdict
        assert one.ci95 is None
    assert against(old, old, Limits(max_node_increase=0.0)).verdict == "within_limit"
    assert against(old, new, Limits(max_node_increase=0.0)).verdict == "improved"


@pytest.mark.parametrize(("change", "figure"), CHANGES)
def test_a_change_is_told_without_a_limit_and_without_a_change_of_time(
    change: dict[str, Any], figure: str
) -> None:
    found = against(report(work(**change)), report(work()))
    assert found.verdict == "within_limit"
    assert [one.figure for one in found.work] == [figure]
    assert len(annotation_lines(found)) == 1
    assert not against(report(work()), report(work())).work


def test_a_change_beyond_its_limit_is_annotated_once() -> None:
    new = report(work(nodes={"Cast": 3, "MatMul": 40}))
    found = against(new, report(work()), Limits(max_node_increase=0.0))
    assert [one.figure for one in found.work] == ["nodes"]
    (line,) = annotation_lines(found)
    assert line.startswith("::error")


def test_a_change_and_its_step_in_the_history_are_annotated_once(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    old, new = report(work()), report(work(weight_bytes=4001), 80.1)
    append(history, entry_of(old, against(old, old), commit="1"))
    baseline = old.write(tmp_path / "baseline.json")
    lines = []
    for name in ("report.json", "later.json"):
        saved = new.write(tmp_path / name)
        asked = CheckRequest(saved, baseline=baseline, limits=TIME, history=history, commit="2")
        found, _ = run_check(asked)
        assert [curve.subject for curve, _ in steps_of(found)] == ["weight_bytes"]
        lines.append(len(annotation_lines(found)))
    assert lines == [1, 1]


def test_other_operators_of_the_same_number_are_a_change() -> None:
    (one,) = against(report(work(nodes={"Cast": 3, "MatMul": 39})), report(work())).work
    assert (one.before, one.after, one.kinds) == (42, 42, {"Cast": 1, "MatMul": -1})


@pytest.mark.parametrize(("ms", "count"), [(88.0, 1), (80.0, 0), (70.0, 1)])
def test_a_change_of_time_of_the_same_graph_is_told(ms: float, count: int) -> None:
    same, other = (
        against(report(work(**c), ms), report(work())) for c in ({}, {"weight_bytes": 1})
    )
    still = against(report(work()), report(work()))
    assert len(same.notes) - len(still.notes) == count
    assert other.work
    assert not same.work


@pytest.mark.parametrize(("second_ms", "count"), [(88.0, 1), (80.0, 0)])
def test_a_slowdown_that_did_not_hold_is_no_change_of_time(second_ms: float, count: int) -> None:
    old, slow, second = (report(work(), ms) for ms in (80.0, 88.0, second_ms))
    found = confirmed(
        against(slow, old), lambda: against(second, old),
        report=slow, baseline=BaselineMatch(old), measurements=1,
    )  # fmt: skip
    assert len(found.notes) - len(against(old, old).notes) == count


def test_engines_have_layers_and_scratch() -> None:
    old, new = (report(work(), engines=[engine(n, 100 * n)]) for n in (4, 5))
    told = {one.figure: (one.before, one.after) for one in against(new, old).work}
    assert told == {"engine_layers": (4, 5), "scratch_bytes": (400, 500)}
    limits = Limits(max_layer_increase=0.0, max_scratch_increase=1.0)
    verdicts = {one.quantity: one.verdict for one in against(new, old, limits).checks}
    assert verdicts == {"engine_layers": "regressed", "scratch_bytes": "within_limit"}


@pytest.mark.parametrize(("ms", "count"), [(88.0, 1), (80.0, 0)])
def test_another_engine_of_the_same_graph_is_no_change_of_the_graph(ms: float, count: int) -> None:
    old, new = (report(work(), 80.0 if n == 4 else ms, engines=[engine(n, 9)]) for n in (4, 5))
    found = against(new, old)
    assert [one.figure for one in found.work] == ["engine_layers"]
    assert len(found.notes) - len(against(old, old).notes) == count


def test_what_can_t_be_compared_is_told() -> None:
    plain = report(work())
    fewer = report(work(cache_bytes=None))
    for old, new in ((report(None), plain), (plain, fewer), (fewer, plain)):
        assert len(against(new, old, Limits(max_kl=1.0)).notes) == 1
    assert not against(plain, plain, Limits(max_kl=1.0)).notes


def test_nodes_that_were_none_are_told_by_their_number() -> None:
    old, new = report(work(nodes={})), report(work(nodes={"Cast": 3456}))
    (one,) = against(new, old, Limits(max_node_increase=0.5)).checks
    assert one.verdict == "regressed"
    assert "3,456" in change_words(one)
    assert "inf" not in change_words(one)


def test_a_report_of_an_older_version_has_no_figures_and_no_limit_holds_for_it() -> None:
    old, new = report(None), report(work())
    assert against(new, old).verdict == "within_limit"
    assert not against(new, old).work
    assert against(new, old, Limits(max_node_increase=0.0)).verdict == "inconclusive"


def test_what_earlier_versions_counted_otherwise_is_not_compared() -> None:
    data = report(work()).model_dump(mode="json")
    data["arms"]["candidate"]["work"] |= {"prompt_macs": 9, "step_macs": 9, "prompt_tokens": 1}
    old = ComparisonReport.model_validate(data)
    assert old.arms.candidate.work is None
    line = entry_of(old, against(old, old), commit=None).model_dump(mode="json")
    line["work"] = {"nodes": 42, "weight_bytes": 9, "prompt_macs": 9}
    assert HistoryEntry.model_validate(line).work == {"nodes": 42}


def test_history_and_ci_formats_have_the_figures() -> None:
    new = report(work())
    entry = entry_of(new, against(new, new), commit=None)
    assert entry.work == new.arms.candidate.work.figures  # type: ignore[union-attr]
    smaller = github_benchmark(new)["smaller.json"]
    assert all(f'"model: {name}"' in smaller for name in ("nodes", "weight-bytes", "cache-bytes"))


def test_an_arm_of_no_graph_has_no_figures() -> None:
    arm: Arm = gate_arm("base")
    assert arm.counted == {}


@pytest.mark.parametrize(("floor", "count"), [(0.05, 1), (0.03, 0), (0.01, 0)])
def test_a_noise_floor_above_its_limit_is_told(floor: float, count: int) -> None:
    found = against(report(work()), report(work()), Limits(max_slowdown=0.03, noise_floor=floor))
    assert len([note for note in found.notes if "--noise-floor" in note]) == count
