"""What a report must hold before anything is concluded from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from exporter.artifacts import ComparisonReport, LatencyRow, LatencySamples, Speedup
from exporter.errors import RegressionError
from exporter.gate.keys import rows_by_name

_AGAIN = "Measure again with depthcut compare; nothing can be concluded from this report."


def refuse_unsound(report: ComparisonReport, name: str) -> None:
    """Refuses a report that no measurement can have given.

    Args:
        report: The report.
        name: The file, for the error.

    Raises:
        RegressionError: For rows of one shape, rows without times, and numbers that are no times,
            no factors, or not in order. The text has the JSON path.
    """
    try:
        rows_by_name(report)
        for number, row in enumerate(report.latency):
            _refuse_row(row, f"$.latency[{number}]")
        _refuse_accuracy(report)
    except RegressionError as error:
        raise RegressionError(f"{name}: {error.message}", error.hint) from None


def _refuse_row(row: LatencyRow, path: str) -> None:
    for arm in ("baseline", "candidate"):
        _refuse_times(getattr(row, arm), 1 if row.imported else row.rounds, f"{path}.{arm}")
    _refuse_speedup(row.speedup, f"{path}.speedup")
    if row.verdict_interval is not None:
        judged = Speedup(ratio=row.speedup.ratio, ci95=row.verdict_interval)
        _refuse_speedup(judged, f"{path}.verdict_interval")
    if row.noise_floor is not None and not math.isfinite(row.noise_floor.ratio):
        raise RegressionError(f"{path}.noise_floor.ratio is {row.noise_floor.ratio}.", _AGAIN)


def _refuse_times(times: LatencySamples, rounds: int, path: str) -> None:
    if not times.samples_ms:
        raise RegressionError(f"{path}.samples_ms is empty.", _AGAIN)
    for number, value in enumerate(times.samples_ms):
        if not (math.isfinite(value) and value > 0):
            raise RegressionError(f"{path}.samples_ms[{number}] is {value}: no time.", _AGAIN)
    count = len(times.samples_ms)
    if count % rounds:
        raise RegressionError(
            f"{path}.samples_ms has {count} times, which are not {rounds} equal rounds.", _AGAIN
        )
    if not (math.isfinite(times.median_ms) and times.median_ms > 0):
        raise RegressionError(f"{path}.median_ms is {times.median_ms}: no time.", _AGAIN)


def _refuse_speedup(speedup: Speedup, path: str) -> None:
    low, high = speedup.ci95
    if not all(math.isfinite(value) and value > 0 for value in (speedup.ratio, low, high)):
        raise RegressionError(f"{path} is {speedup.ratio} [{low}, {high}]: no factor.", _AGAIN)
    if low > high:
        raise RegressionError(f"{path}.ci95 ends ({high}) before it begins ({low}).", _AGAIN)


def _refuse_accuracy(report: ComparisonReport) -> None:
    """NaN is refused; a candidate's infinite perplexity is a result, and a bad one."""
    accuracy = report.accuracy
    if accuracy is None:
        return
    wrong = next(_not_numbers(accuracy.model_dump(), "$.accuracy"), None)
    if wrong is None and accuracy.perplexity and not math.isfinite(accuracy.perplexity.baseline):
        wrong = "$.accuracy.perplexity.baseline"
    if wrong is not None:
        raise RegressionError(f"{wrong} is not a number.", _AGAIN)


def _not_numbers(value: Any, path: str) -> Iterator[str]:
    """The JSON paths of all NaN, but that of a ranking of texts which are all alike."""
    if isinstance(value, float) and math.isnan(value) and not path.endswith(".rank_agreement"):
        yield path
    parts = value.items() if isinstance(value, dict) else ()
    for name, part in parts:
        yield from _not_numbers(part, f"{path}.{name}")
    for number, part in enumerate(value if isinstance(value, (list, tuple)) else ()):
        yield from _not_numbers(part, f"{path}[{number}]")
