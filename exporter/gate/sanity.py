"""What a report must hold before anything is concluded from it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from exporter.artifacts import Accuracy, ComparisonReport, LatencyRow
from exporter.compare.timing.statistics import estimate_between
from exporter.errors import RegressionError
from exporter.gate.keys import rows_by_name

_TOLERANCE = 1e-3
"""Of a figure against what its own samples give: below every limit that anyone sets."""
_AGAIN = "Measure again with depthcut compare; nothing can be concluded from this report."


def refuse_unsound(report: ComparisonReport, name: str) -> None:
    """Refuses a report that no measurement can have given."""
    try:
        rows_by_name(report)
        for number, row in enumerate(report.latency):
            _refuse_row(row, f"$.latency[{number}]")
        _refuse_no_numbers(report)
        if report.accuracy is not None:
            _refuse_contradictions(report.accuracy)
    except RegressionError as error:
        raise RegressionError(f"{name}: {error.message}", error.hint, code=error.code) from None


def _refuse_row(row: LatencyRow, path: str) -> None:
    for arm, times in (("baseline", row.baseline), ("candidate", row.candidate)):
        if (count := len(times.samples_ms)) % row.rounds:
            raise RegressionError(
                f"{path}.{arm}.samples_ms has {count} times, which are not {row.rounds} equal "
                "rounds.",
                _AGAIN,
                code="unequal-rounds",
            )
        sampled = float(np.median(times.samples_ms))
        _refuse_other(times.median_ms, sampled, f"{path}.{arm}.median_ms", "samples_ms")
    if row.rounds > 1:
        try:
            sampled = math.exp(estimate_between(row, "baseline", "candidate").log_ratio)
        except ValueError as error:
            raise RegressionError(f"{path}: {error}.", _AGAIN, code="unequal-rounds") from None
        _refuse_other(row.speedup.ratio, sampled, f"{path}.speedup.ratio", "samples_ms")


def _refuse_contradictions(accuracy: Accuracy) -> None:
    """Figures that stand twice, or that follow from others."""
    for path, item, value, source in _told_twice(accuracy):
        if item is not None and value is not None:
            _refuse_other(item, value, f"$.accuracy.{path}", source)


_ToldTwice = tuple[str, float | None, float | None, str]


def _told_twice(accuracy: Accuracy) -> Iterator[_ToldTwice]:
    """JSON path, what stands there, what should, and what that follows from."""
    for field, interval in (("kl_divergence", "kl_interval"), ("top1_agreement", "top1_interval")):
        value = getattr(accuracy, interval)
        if value is not None:
            yield f"{interval}.value", value.value, getattr(accuracy, field), field
    texts = accuracy.embeddings
    for field, interval in (("cosine", "cosine_interval"), ("rank_agreement", "rank_interval")):
        value = None if texts is None else getattr(texts, interval)
        if value is not None:
            yield f"embeddings.{interval}.value", value.value, getattr(texts, field), field
    for number, task in enumerate(accuracy.tasks):
        candidate = task.candidate - task.baseline
        yield f"tasks[{number}].difference.value", task.difference.value, candidate, "both scores"
    yield from _perplexity_told_twice(accuracy)


def _perplexity_told_twice(accuracy: Accuracy) -> Iterator[_ToldTwice]:
    pair, losses = accuracy.perplexity, accuracy.sample_losses
    if pair is None:
        return
    if accuracy.log_perplexity_increase is not None:
        # A perplexity above the largest number is infinite; the increase still has its value then.
        most = math.log(sys.float_info.max) - math.log(pair.baseline)
        smallest = min(math.log(pair.candidate) - math.log(pair.baseline), most)
        value = min(accuracy.log_perplexity_increase.value, most)
        yield "log_perplexity_increase.value", value, smallest, "perplexity"
    if losses is None or not sum(losses.tokens):
        return
    for arm in ("baseline", "candidate"):
        mean = sum(getattr(losses, arm)) / sum(losses.tokens)
        if mean < 700:
            yield f"perplexity.{arm}", getattr(pair, arm), math.exp(mean), "sample_losses"


def _refuse_other(value: float, content: float, path: str, source: str) -> None:
    if not math.isclose(value, content, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE / 10):
        raise RegressionError(
            f"{path} is {value:.6g}, but {source} give {content:.6g}.", _AGAIN, code="contradiction"
        )


def _refuse_no_numbers(report: ComparisonReport) -> None:
    """NaN is refused; a candidate's infinite perplexity is a result, and a bad one."""
    accuracy = report.accuracy
    if accuracy is None:
        return
    wrong = next(_not_numbers(accuracy.model_dump(), "$.accuracy"), None)
    if wrong is None and accuracy.perplexity and not math.isfinite(accuracy.perplexity.baseline):
        wrong = "$.accuracy.perplexity.baseline"
    if wrong is not None:
        raise RegressionError(f"{wrong} is not a number.", _AGAIN, code="not-a-number")


def _not_numbers(value: Any, path: str) -> Iterator[str]:
    """The JSON paths of all NaN, but that of a ranking of texts which are all alike."""
    if isinstance(value, float) and math.isnan(value) and not path.endswith(".rank_agreement"):
        yield path
    parts = value.items() if isinstance(value, dict) else ()
    for name, part in parts:
        yield from _not_numbers(part, f"{path}.{name}")
    for number, part in enumerate(value if isinstance(value, (list, tuple)) else ()):
        yield from _not_numbers(part, f"{path}[{number}]")
