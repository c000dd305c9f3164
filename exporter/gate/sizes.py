"""Sizes: files and engines on disk, KV cache and device memory. They are counted, not measured."""

from __future__ import annotations

from collections.abc import Callable

from exporter.artifacts import Arm, Check, ComparisonReport, Quantity
from exporter.errors import RegressionError
from exporter.gate.limits import Limits
from exporter.gate.verdicts import CheckedValue, checked

_Counts = dict[str, Callable[[Arm], int | None]]


def _largest_engine(arm: Arm) -> int | None:
    """Of several builds: any of them may be shipped."""
    return max((engine.engine_bytes for engine in arm.engines), default=None)


_SIZES: _Counts = {"files": lambda arm: arm.file_bytes, "engines": _largest_engine}
_MEMORY: _Counts = {
    "KV cache per token": lambda arm: arm.kv_cache_bytes_per_token,
    "device memory": lambda arm: arm.device_memory_bytes,
}


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
        checks += _checks("size", before, after, _SIZES, limits.max_size_increase)
    if limits.max_memory_increase is not None:
        checks += _checks("memory", before, after, _MEMORY, limits.max_memory_increase)
    return checks


def _checks(
    quantity: Quantity, before: Arm, after: Arm, counts: _Counts, limit: float
) -> list[Check]:
    checks = []
    for subject, count in counts.items():
        old, new = count(before), count(after)
        if old and new is not None:
            grown = CheckedValue(quantity, subject, "bytes", before=old, after=new, value=new / old)
            checks.append(checked(grown, 1 + limit))
        elif new and old == 0:
            raise RegressionError(
                f"The candidate's {subject} takes {new:,} bytes where there were none before.",
                "These are no two forms of one model; leave the limit out to compare the rest.",
            )
    return checks
