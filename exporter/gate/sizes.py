"""Sizes: files and engines on disk, KV cache and device memory. They are counted, not measured."""

from __future__ import annotations

from collections.abc import Callable

from exporter.artifacts import Arm, Check, ComparisonReport, Quantity
from exporter.errors import RegressionError
from exporter.gate.judge import Estimate, judge
from exporter.gate.limits import Limits

_Count = Callable[[Arm], int | None]


def size_checks(
    report: ComparisonReport, baseline: ComparisonReport | None, limits: Limits
) -> list[Check]:
    """Checks what both sides count.

    Raises:
        RegressionError: A limit is set on what neither report has.
    """
    after = report.arms.candidate
    before = report.arms.baseline if baseline is None else baseline.arms.candidate
    checks = []
    if limits.max_size_increase is not None:
        counts: dict[str, _Count] = {"files": _files, "engines": _engines}
        checks += _checks("size", before, after, counts, limits.max_size_increase)
    if limits.max_memory_increase is not None:
        counts = {"KV cache per token": _cache, "device memory": _device}
        checks += _checks("memory", before, after, counts, limits.max_memory_increase)
    return checks


def _checks(
    quantity: Quantity, before: Arm, after: Arm, counts: dict[str, _Count], limit: float
) -> list[Check]:
    checks = []
    for subject, count in counts.items():
        old, new = count(before), count(after)
        if old and new is not None:
            estimate = Estimate(quantity, subject, "bytes", before=old, after=new, value=new / old)
            checks.append(judge(estimate, 1 + limit))
        elif new and old == 0:
            raise RegressionError(
                f"The candidate's {subject} takes {new:,} bytes where there were none before.",
                "These are no two forms of one model; leave the limit out to compare the rest.",
            )
    return checks


def _files(arm: Arm) -> int | None:
    return arm.file_bytes


def _engines(arm: Arm) -> int | None:
    """The largest of several builds of an engine counts: any of them may be shipped."""
    return max((engine.engine_bytes for engine in arm.engines), default=None)


def _cache(arm: Arm) -> int | None:
    return arm.kv_cache_bytes_per_token


def _device(arm: Arm) -> int | None:
    return arm.device_memory_bytes
