"""The numbers of a report that CI systems plot: one list, from which each format is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from exporter.artifacts import ComparisonReport, LatencyRow, LatencySamples


@dataclass(frozen=True)
class CiMetric:
    """One number of the candidate.

    Attributes:
        subject: The shape, or what else it is of.
        measure: What it is: ``latency``, ``speedup``, ``perplexity``, ...
        unit: ``ms``, ``x``, ``bytes``, ...
        value: The number.
        low: A lower bound; of a time the first quartile, of a speedup its interval's.
        high: An upper bound, likewise.
        better: Which way is good.
    """

    subject: str
    measure: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    better: Literal["lower", "higher"] = "lower"


def metrics(report: ComparisonReport) -> list[CiMetric]:
    """All that are finite."""
    found = [*_times(report), *_accuracy(report), *_sizes(report)]
    return [metric for metric in found if math.isfinite(metric.value)]


def quartiles(samples: LatencySamples) -> tuple[float, float]:
    """The first and the third, in milliseconds."""
    if len(samples.samples_ms) < 2:
        return samples.median_ms, samples.median_ms
    first, _, third = statistics.quantiles(samples.samples_ms, n=4, method="inclusive")
    return first, third


def _times(report: ComparisonReport) -> Iterator[CiMetric]:
    for row in report.latency:
        yield _latency(row)
        low, high = row.speedup.ci95
        yield CiMetric(row.shape_name, "speedup", "x", row.speedup.ratio, low, high, "higher")


def _latency(row: LatencyRow) -> CiMetric:
    low, high = quartiles(row.candidate)
    return CiMetric(row.shape_name, "latency", "ms", row.candidate.median_ms, low, high)


def _accuracy(report: ComparisonReport) -> Iterator[CiMetric]:
    accuracy = report.accuracy
    if accuracy is None:
        return
    if accuracy.perplexity is not None:
        yield CiMetric("accuracy", "perplexity", "", accuracy.perplexity.candidate)
    if accuracy.kl_divergence is not None:
        low, high = (None, None) if accuracy.kl_interval is None else accuracy.kl_interval.ci95
        yield CiMetric("accuracy", "kl-divergence", "nats", accuracy.kl_divergence, low, high)
    if accuracy.top1_agreement is not None:
        agreement = 100 * accuracy.top1_agreement
        yield CiMetric("accuracy", "top1-agreement", "%", agreement, better="higher")
    if accuracy.embeddings is not None:
        cosine = accuracy.embeddings.cosine
        yield CiMetric("accuracy", "embedding-cosine", "", cosine, better="higher")
    for task in (*accuracy.tasks, *accuracy.probes):
        name = f"{task.task} {task.metric}"
        yield CiMetric(name, "score", "", task.candidate, better="higher")


def _sizes(report: ComparisonReport) -> Iterator[CiMetric]:
    arm = report.arms.candidate
    yield CiMetric("model", "file-size", "bytes", arm.file_bytes)
    yield CiMetric("model", "kv-cache-per-token", "bytes", arm.kv_cache_bytes_per_token)
    for figure, value in arm.counted.items():
        unit = "bytes" if figure.endswith("bytes") else ""
        yield CiMetric("model", figure.replace("_", "-"), unit, value)
    if arm.device_memory_bytes is not None:
        yield CiMetric("model", "device-memory", "bytes", arm.device_memory_bytes)
