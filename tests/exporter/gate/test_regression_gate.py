"""A report against a baseline: what is compared, what is refused, what is said."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exporter.cli as command_line
from exporter.artifacts import (
    Arms,
    CheckReport,
    ComparisonReport,
    EngineCheck,
    Interval,
    PerplexityPair,
    SampleLosses,
)
from exporter.artifacts import TaskResult as Task
from exporter.artifacts.figures import LIMITED
from exporter.errors import RegressionError, UsageError
from exporter.gate.gate import BaselineMatch, check
from exporter.gate.limits import Limits, limit_on
from exporter.report.ci import check_name, github_benchmark, junit, limit_words
from exporter.report.words import short_shape
from tests.made_reports import (
    arms_of,
    as_markdown,
    gate_accuracy,
    gate_arm,
    gate_report,
    gate_row,
    made_engine,
    narrow,
    samples,
)
from tests.raising import raises
from tests.reading import in_file

SLOWDOWN = Limits(max_slowdown=0.03)


def verdicts(found: Any) -> dict[str, str]:
    return {f"{one.quantity} {one.subject}": one.verdict for one in found.checks}


def against(report: ComparisonReport, old: ComparisonReport, limits: Limits | None = None) -> Any:
    return check(report, limits, baseline=BaselineMatch(old))


def timed(ms: float, width: float = 0.01, **more: Any) -> ComparisonReport:
    return gate_report([gate_row(candidate_ms=ms, width=width, **more)])


def judged(candidate: float = 20.0, arm: str = "cand", **figures: Any) -> ComparisonReport:
    return gate_report(accuracy=gate_accuracy(candidate, **figures), arms=arms_of(arm))


def embedded(cosine: float, ranks: float, reach: float | None = 0.001) -> dict[str, Any]:
    interval = None if reach is None or math.isnan(cosine) else narrow(cosine, reach)
    agreement = {
        "cosine": cosine, "lowest_cosine": 0.9, "rank_agreement": ranks,
        "cosine_interval": interval, "rank_interval": None if math.isnan(ranks) else narrow(ranks),
    }  # fmt: skip
    return {"embeddings": agreement}


def known(reach: float) -> dict[str, Any]:
    return {"log_perplexity_increase": narrow(math.log(21 / 16), reach)}


def built(*sizes: int) -> ComparisonReport:
    return gate_report(arms=arms_of("c", engines=list(map(made_engine, sizes))))


OLD, RISE = timed(80), Limits(max_perplexity_increase=0.01)
GROWN = judged(20.0, "old", log_perplexity_increase=narrow(math.log(20 / 16), 0.01))
WORDS: list[tuple[ComparisonReport, ComparisonReport | None, Limits, str]] = [
    (timed(84.8), OLD, SLOWDOWN, "regressed"),
    (timed(84.8, 0.05), timed(80, 0.05), SLOWDOWN, "inconclusive"),
    (timed(80.5), OLD, SLOWDOWN, "within_limit"),
    (timed(72.0), OLD, SLOWDOWN, "improved"),
    (timed(160.0, rounds=5), timed(80.0, rounds=5), SLOWDOWN, "inconclusive"),
    (timed(160.0, baseline_ms=200.0), OLD, SLOWDOWN, "within_limit"),  # all of it twice as slow
    (timed(80), None, Limits(max_slowdown=0), "improved"),
    (timed(110), None, Limits(max_slowdown=0), "regressed"),
    (timed(80), None, Limits(min_speedup=1.2), "within_limit"),
    (timed(80), None, Limits(min_speedup=1.25), "inconclusive"),
    (timed(80), None, Limits(min_speedup=1.5), "regressed"),
    (judged(21.0, "new", **known(0.01)), GROWN, RISE, "regressed"),
    (judged(21.0, "new", **known(0.1)), GROWN, RISE, "inconclusive"),
    (judged(kl_interval=narrow(0.2, 0.02)), None, Limits(max_kl=0.199), "inconclusive"),
    (judged(kl_interval=None), None, Limits(max_kl=0.199), "inconclusive"),
    (judged(top1_interval=narrow(0.8, 0.02)), None, Limits(min_top1_agreement=0.801),
     "inconclusive"),
    (judged(top1_interval=None), None, Limits(min_top1_agreement=0.801), "inconclusive"),
    (judged(log_perplexity_increase=None), None, Limits(max_perplexity_increase=0.24),
     "inconclusive"),
    (judged(**embedded(0.97, 0.95, 0.02)), None, Limits(min_embedding_cosine=0.98), "inconclusive"),
    (judged(**embedded(0.97, 0.95, None)), None, Limits(min_embedding_cosine=0.98), "inconclusive"),
    (built(100, 140), built(100, 110), Limits(max_size_increase=0.1), "regressed"),
    (built(140, 110), built(100, 140), Limits(max_size_increase=0.1), "within_limit"),
    *((gate_report(arms=arms_of("cand", nodes=nodes)), gate_report(),
       Limits(max_node_increase=0.0), word)
      for nodes, word in ((101, "regressed"), (100, "within_limit"), (99, "improved"))),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(WORDS)))
def test_a_figure_gets_the_word_that_its_interval_allows(row: int) -> None:
    new, old, limits, word = WORDS[row]
    result = check(new, limits) if old is None else against(new, old, limits)
    assert result.verdict == word
    if limits is SLOWDOWN:
        assert "relative to the unpruned arm" in result.notes[0]


def test_the_measured_noise_of_both_sessions_counts() -> None:
    old, new = (gate_report([gate_row(candidate_ms=ms, noise=1.05)]) for ms in (80.0, 84.8))
    (one,) = against(new, old, SLOWDOWN).checks
    assert one.verdict == "inconclusive"
    assert one.noise_floor == pytest.approx(math.expm1(math.sqrt(2) * math.log(1.05)), rel=1e-12)


def test_an_interval_is_the_one_that_a_verdict_rests_on_and_one_of_95_percent() -> None:
    """It is wider where a row was looked at more than once; one look's is one of 90 %."""
    old, new = timed(80), gate_row(candidate_ms=86.0)
    (low, high), ratio = new.speedup.ci95, new.speedup.ratio
    wide = new.model_copy(update={"verdict_interval": (ratio / 1.06, ratio * 1.06)})
    one_look = new.model_copy(update={"verdict_interval": (low * 1.005, high / 1.005)})
    (one,) = against(gate_report([wide]), old, SLOWDOWN).checks
    assert one.verdict == "inconclusive"
    assert "compare --rounds" in one.reason
    assert against(gate_report([new]), old, SLOWDOWN).verdict == "regressed"
    for limits in (SLOWDOWN, Limits(min_speedup=1.1)):
        (wanted,) = against(gate_report([new]), old, limits).checks
        (result,) = against(gate_report([one_look]), old, limits).checks
        assert result.ci95 == wanted.ci95


def test_all_defaults_against_a_baseline() -> None:
    arms = arms_of("new", file_bytes=1_030_000)
    result = against(gate_report(arms=arms, accuracy=gate_accuracy(20.5)), gate_report())
    assert verdicts(result) == {
        "time prefill 128": "within_limit",
        "time prefill 512": "within_limit",
        "perplexity evaluation text": "regressed",
        "size files": "regressed",
        "memory KV cache per token": "within_limit",
    }
    assert result.verdict == "regressed"


def test_perplexity_on_the_same_samples_is_compared_sample_by_sample() -> None:
    """Samples are hard for both candidates or for neither: pairs see a change that sums hide."""
    hard = np.linspace(1.0, 5.0, 16)

    def told(extra: np.ndarray, name: str, **changes: Any) -> ComparisonReport:
        candidate = 100 * (hard + 0.4 * hard + extra)
        losses = SampleLosses(
            tokens=[100] * 16, baseline=list(100 * hard), candidate=list(candidate)
        )
        increase = float((candidate - 100 * hard).sum() / 1600)
        spread = Interval(value=increase, ci95=(increase - 0.25, increase + 0.25))
        pair = PerplexityPair(baseline=math.exp(3.0), candidate=math.exp(3.0 + increase))
        accuracy = gate_accuracy(
            perplexity=pair, log_perplexity_increase=spread, sample_losses=losses, **changes
        )
        arms = arms_of(name)
        return gate_report(accuracy=accuracy, arms=arms)

    noise = np.random.default_rng(0).normal(0, 0.01, 16)
    old, limits = told(np.zeros(16), "old"), Limits(max_perplexity_increase=0.01)
    assert against(told(0.05 + noise, "new"), old, limits).verdict == "regressed"
    assert against(told(0.002 + noise / 10, "new"), old, limits).verdict == "within_limit"
    other = told(0.05 + noise, "new", text_sha256="f" * 64)
    assert against(other, old, limits).verdict == "inconclusive"


def test_the_same_candidate_on_the_same_text_is_exact() -> None:
    interval = Interval(value=math.log(20 / 16), ci95=(0.1, 0.34))
    report = judged(log_perplexity_increase=interval)
    other = report.model_copy(update={"latency": [gate_row(candidate_ms=80.1)]})
    (one,) = against(report, other, Limits(max_perplexity_increase=0.01)).checks
    assert (one.verdict, one.ci95) == ("within_limit", None)


@pytest.mark.parametrize("loss", [711.0, 800.0])
@pytest.mark.parametrize("reach", [0.1, 30.0])
def test_a_perplexity_beyond_all_numbers_regressed_by_its_interval(
    loss: float, reach: float
) -> None:
    limits, interval = Limits(max_perplexity_increase=0.5), narrow(loss - math.log(16), reach)
    losses = SampleLosses(tokens=[4096], baseline=[4096 * math.log(16)], candidate=[4096 * loss])
    collapsed = judged(math.inf, log_perplexity_increase=interval, sample_losses=losses)
    assert check(collapsed, limits).verdict == "regressed"
    assert against(collapsed, gate_report(), limits).verdict == "regressed"
    assert against(gate_report(), collapsed, limits).verdict == "improved"
    assert check(judged(math.inf), limits).verdict == "regressed"


def task(candidate: float, *interval: float) -> Task:
    difference = Interval(value=candidate - 0.6, ci95=interval)
    return Task(
        task="arc", metric="acc", items=500, baseline=0.6, candidate=candidate,
        difference=difference,
    )  # fmt: skip


def loss(candidate: float, higher_is_better: bool) -> ComparisonReport:
    """A task's loss of 2.0 in the baseline, or what is no loss but the same number."""
    one = Task(
        task="lambada", metric="log_perplexity", items=500, baseline=2.0, candidate=candidate,
        difference=narrow(candidate - 2.0, 0.01), higher_is_better=higher_is_better,
    )  # fmt: skip
    return judged(tasks=[one])


@pytest.mark.parametrize(
    ("candidate", "higher_is_better", "word"),
    [
        (2.3, False, "regressed"),
        (2.3, True, "improved"),
        (1.7, False, "improved"),
        (1.7, True, "regressed"),
        (2.0, False, "within_limit"),
    ],
)
def test_a_metric_of_which_less_is_better_may_not_grow(
    candidate: float, higher_is_better: bool, word: str
) -> None:
    limits = Limits(max_task_drop=0.1)
    now, before = loss(candidate, higher_is_better), loss(2.0, higher_is_better)
    for item in (check(now, limits), against(now, before, limits)):
        (only,) = item.checks
        assert only.verdict == word
    side, result = ("at most", "0.100") if not higher_is_better else ("at least", "-10.0 %")
    assert limit_words(only) == f"{side} {result}"


@pytest.mark.parametrize(
    ("candidate", "interval", "word"),
    [
        (0.5, (-0.12, -0.08), "regressed"),
        (0.5, (-0.19, -0.01), "inconclusive"),
        (0.59, (-0.015, -0.005), "within_limit"),
    ],
)
def test_tasks_are_compared_by_points(
    candidate: float, interval: tuple[float, float], word: str
) -> None:
    limits, report = Limits(max_task_drop=0.02), judged(tasks=[task(candidate, *interval)])
    (result,) = check(report, limits).checks
    assert (result.quantity, result.verdict) == ("task", word)
    assert against(report, report, limits).verdict == "within_limit"


def test_tasks_that_one_of_two_reports_has_are_undecided() -> None:
    one = task(0.6, -0.01, 0.01)
    first, more = judged(tasks=[one]), judged(tasks=[one, one.model_copy(update={"task": "piqa"})])
    for pair in ((more, first), (first, more)):
        words = verdicts(against(*pair, Limits(max_task_drop=0.02)))
        assert words["task piqa, acc"] == "inconclusive"
    with raises(RegressionError, "unsound", "arc, acc"):
        check(judged(tasks=[one, one]), Limits(max_task_drop=0.02))


TWICE = gate_report([gate_row(), gate_row(candidate_ms=10.0)])
LONGER = samples(104.0)
"""Samples that took 30 % longer beside the old ratio were "+0.0 %" once."""
SPOILT: list[tuple[ComparisonReport, tuple[Any, ...]]] = [
    (gate_report([gate_row(candidate=samples(80.0, 3))]),
     ("unsound", "r.json", "$.latency[0]", 3, 12)),
    (gate_report([gate_row(candidate=LONGER)]), ("unsound", "$.latency[0].speedup.ratio")),
    (gate_report([gate_row(candidate=LONGER.model_copy(update={"median_ms": 80.0}))]),
     ("unsound", "candidate.median_ms")),
    (gate_report([gate_row(speedup={"ratio": 1.3, "ci95": (1.29, 1.31)})]),
     ("unsound", "$.latency[0].speedup.ratio")),
    (judged(perplexity=PerplexityPair(baseline=math.inf, candidate=math.inf)),
     ("unsound", "$.accuracy.perplexity.baseline")),
    *((judged(**changes), ("unsound", f"$.accuracy.{path}")) for changes, path in (
        (embedded(math.nan, 1.0), "figures.embedding_cosine"),
        ({"kl_interval": Interval(value=0.1, ci95=(math.nan, 0.2))},
         "intervals.kl_divergence.ci95[0]"),
        ({"tasks": [task(0.5, math.nan, 0.0)]}, "tasks[0].difference.ci95[0]"),
        ({"top1_agreement": math.nan}, "top1_agreement"),
    )),
    *((judged(**changes), ("unsound", f"$.accuracy.{path}")) for changes, path in (
        ({"kl_interval": narrow(0.1)}, "intervals.kl_divergence.value"),
        ({"top1_agreement": 0.9}, "intervals.top1_agreement.value"),
        ({"log_perplexity_increase": narrow(0.0)}, "intervals.perplexity.value"),
        ({"candidate": math.inf, "log_perplexity_increase": narrow(0.1)},
         "intervals.perplexity.value"),
        ({"tasks": [task(0.5, -0.2, 0.0).model_copy(update={"candidate": 0.6})]}, "tasks[0]"),
        ({"sample_losses": SampleLosses(tokens=[9], baseline=[9.0], candidate=[9.0])},
         "perplexity.baseline"),
    )),
]  # fmt: skip


def test_a_shape_that_stands_twice_is_refused() -> None:
    with raises(RegressionError, "unsound", "prefill"):
        check(TWICE, SLOWDOWN)


@pytest.mark.parametrize("limits", [SLOWDOWN, Limits(max_kl=1)])
@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_a_report_that_can_t_be_true_is_refused(number: int, limits: Limits) -> None:
    report, told = SPOILT[number]
    with raises(RegressionError, *told):
        check(report, limits, name="r.json")


def test_texts_that_are_all_alike_are_no_contradiction() -> None:
    assert check(judged(**embedded(1.0, math.nan)), Limits(max_kl=9)).verdict == "within_limit"


def _complete() -> ComparisonReport:
    """A report with every figure that a limit can be on."""
    arms = [gate_arm(name, engines=[made_engine()], device_memory_bytes=9) for name in ("b", "c")]
    score = task(0.6, -0.001, 0.001)
    accuracy = gate_accuracy(tasks=[score], **embedded(0.97, 0.95))
    return gate_report(accuracy=accuracy, arms=Arms(baseline=arms[0], candidate=arms[1]))


COMPLETE = _complete()
EMPTY: dict[str, Any] = {"kv_cache_bytes_per_token": 0, "file_bytes": 0, "nodes": 0}
GENEROUS: dict[str, float] = {
    limit: 0.01 if limit.startswith("min_") else 99.0 for limit in map(limit_on, LIMITED)
}


def _worse() -> ComparisonReport:
    """The same of a candidate that is worse by every figure."""
    assert COMPLETE.accuracy is not None
    sizes = {"file_bytes": 2_000_000, "kv_cache_bytes_per_token": 8192, "nodes": 200}
    arm = gate_arm("c", engines=[made_engine(18)], device_memory_bytes=18, **sizes)
    return COMPLETE.model_copy(
        update={
            "latency": [gate_row(candidate_ms=120.0)],
            "arms": Arms(baseline=COMPLETE.arms.baseline, candidate=arm),
            "accuracy": COMPLETE.accuracy.model_copy(update={"tasks": [task(0.5, -0.11, -0.09)]}),
        }
    )


WORSE = _worse()


@pytest.mark.parametrize("key", LIMITED)
def test_a_figure_is_a_row_a_limit_both_ways_and_an_entry_of_ci(key: str) -> None:
    figure, name = LIMITED[key], limit_on(key)
    strict = 0.99 if name.startswith("min_") else 0.01
    for limit, word in ((GENEROUS[name], "within_limit"), (strict, "regressed")):
        result = check(WORSE, Limits(**{name: limit}))
        assert {one.quantity for one in result.checks} == {key}
        assert {one.verdict for one in result.checks} == {word}
        assert check_name(result.checks[0]) in junit(result)
    page, entries = as_markdown(WORSE), github_benchmark(WORSE)
    for one in figure.readings(WORSE.accuracy, WORSE.arms.candidate):
        if figure.row_name:
            row = figure.words(figure.row_name, WORSE.accuracy)
            assert any(row in line and figure.row(one.value) in line for line in page.splitlines())
        if one.place.ci:
            file = entries[f"{'bigger' if figure.higher_is_better else 'smaller'}.json"]
            (entry,) = (e for e in json.loads(file) if e["name"] == one.place.ci.format(one.item))
            assert entry["value"] == pytest.approx(figure.ci_factor * one.value)


Named = tuple[str, str]
ALL = [(one.quantity, one.subject) for one in check(COMPLETE, Limits(**GENEROUS)).checks]


def without(report: ComparisonReport, figure: Named) -> ComparisonReport:
    """The report without one figure of its candidate, and without what stands in it alone."""
    (quantity, subject), arm, accuracy = figure, report.arms.candidate, report.accuracy
    lost: dict[Named, dict[str, Any]] = {
        ("size", "files"): {"file_bytes": 0},
        ("size", "engines"): {"engines": []},
        ("memory", "KV cache per token"): {"kv_cache_bytes_per_token": 0},
        ("memory", "device memory"): {"device_memory_bytes": None},
        ("nodes", "graph"): {"nodes": 0},
    }
    gone: dict[str, dict[str, Any]] = {
        "embedding_cosine": {"figures": {}},
        "rank_agreement": {"figures": {}},
        "task": {"tasks": []},
    }
    if quantity in ("time", "speedup"):
        rows = [row for row in report.latency if short_shape(row) != subject]
        return report.model_copy(update={"latency": rows})
    if figure in lost:
        arms = report.arms.model_copy(update={"candidate": arm.model_copy(update=lost[figure])})
        return report.model_copy(update={"arms": arms})
    assert accuracy is not None
    changes = gone.get(quantity, {quantity: None})
    return report.model_copy(update={"accuracy": accuracy.model_copy(update=changes)})


@pytest.mark.parametrize("side", ["report", "baseline", "both"])
@pytest.mark.parametrize("figure", ALL, ids=str)
def test_a_figure_that_is_missing_is_never_within_the_limit(figure: Named, side: str) -> None:
    old = new = COMPLETE
    same_limit = [one for one in ALL if side == "both" and limit_on(one[0]) == limit_on(figure[0])]
    for lost in same_limit or [figure]:
        new = new if side == "baseline" else without(new, lost)
        old = old if side == "report" else without(old, lost)
    limits = Limits(**{limit_on(figure[0]): GENEROUS[limit_on(figure[0])]})
    assert against(COMPLETE, COMPLETE, limits).verdict in ("within_limit", "improved")
    result = against(new, old, limits)
    assert result.verdict == "inconclusive"
    unknown = {one.quantity for one in result.checks if one.verdict == "inconclusive"}
    assert limit_on(figure[0]) in {limit_on(quantity) for quantity in unknown}
    if side == "report":
        others = against(new, old, Limits(max_kl=99.0) if "kl" not in figure[0] else None)
        assert figure in [
            (one.quantity, one.subject) for one in others.checks if one.verdict == "inconclusive"
        ]


@pytest.mark.parametrize("limit", sorted(map(limit_on, LIMITED)))
def test_a_limit_on_what_was_not_measured_is_no_verdict(limit: str, tmp_path: Path) -> None:
    arms = [gate_arm(name, **EMPTY) for name in ("b", "c")]
    bare = gate_report([], accuracy=None, arms=Arms(baseline=arms[0], candidate=arms[1]))
    (one,) = check(bare, Limits(**{limit: GENEROUS[limit]})).checks
    assert (limit_on(one.quantity), one.verdict) == (limit, "inconclusive")
    path = bare.write(tmp_path / "report.json")
    output = tmp_path / "check.json"
    number = f"{GENEROUS[limit]:{'g' if limit in ('min_speedup', 'max_kl') else '.0%'}}"
    words = in_file(tmp_path, [f"{limit}: {number}"])
    assert command_line.run(["check", str(path), "-o", str(output), *words]) == 3
    assert CheckReport.read(output).checks == [one]


def test_nothing_to_check_is_said() -> None:
    with raises(UsageError, "nothing-to-check", "--baseline"):
        check(gate_report())
    bare = Arms(baseline=gate_arm("b", **EMPTY), candidate=gate_arm("c", **EMPTY))
    with raises(RegressionError, "nothing-limited"):
        against(*[gate_report([], accuracy=None, arms=bare)] * 2)


@pytest.mark.parametrize("error", [None, 0.1, 0.3, float("inf")])
def test_engines_that_differ_are_refused_and_unchecked_ones_said(error: float | None) -> None:
    check_made = error and EngineCheck(card="a card", worst="logits", error=error, tolerance=0.2)
    arm = gate_arm("cand", engines=[made_engine(path="m.engine", check=check_made)])
    report = gate_report(arms=Arms(baseline=gate_arm("base"), candidate=arm))
    if error is not None and error > 0.2:
        with raises(RegressionError, "unsound", "m.engine"):
            check(report, SLOWDOWN)
        return
    said = [note for note in check(report, SLOWDOWN).notes if "m.engine" in note]
    assert len(said) == (error is None)


def test_engines_that_did_not_run_are_checked_by_what_is_known_of_them() -> None:
    arms = Arms(
        baseline=gate_arm("base", not_run="built, not run: no driver"),
        candidate=gate_arm("cand", not_run="built, not run: no driver"),
    )
    report = gate_report([], accuracy=None, arms=arms)
    result = against(report, report)
    assert verdicts(result) == {
        "size files": "within_limit",
        "memory KV cache per token": "within_limit",
    }
    assert result.notes == [
        f"{name}: built, not run: no driver." for name in ("unpruned arm", "candidate")
    ]
    assert against(report, report, SLOWDOWN).verdict == "inconclusive"
