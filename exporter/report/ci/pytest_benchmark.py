"""pytest-benchmark's JSON: both arms of each shape, in seconds, for ``pytest-benchmark compare``.

The statistics are those of the raw samples, computed as pytest-benchmark does; the arms' pairing
is lost in it.
"""

from __future__ import annotations

import json
import platform
import statistics
from datetime import UTC, datetime
from typing import Any

from exporter.artifacts import ComparisonReport, LatencyRow, LatencySamples
from exporter.report.ci import Checked
from exporter.report.ci.metrics import quartiles

_FORMAT = "5.1.0"  # of pytest-benchmark, whose format this is


def render(checked: Checked) -> str:
    """The whole file."""
    report, moment = checked.report, datetime.now(UTC).isoformat()
    data = {
        "machine_info": _machine(report),
        "commit_info": {"id": "unknown", "time": moment, "dirty": False, "branch": "unknown"},
        "benchmarks": [
            _benchmark(row, arm, samples)
            for row in report.latency
            for arm, samples in (("baseline", row.baseline), ("candidate", row.candidate))
        ],
        "datetime": moment,
        "version": _FORMAT,
    }
    return json.dumps(data, indent=2) + "\n"


def _machine(report: ComparisonReport) -> dict[str, Any]:
    machine = report.environment
    return {
        "node": "unknown",
        "processor": machine.processor,
        "machine": machine.machine,
        "python_implementation": platform.python_implementation(),
        "python_version": machine.python,
        "system": machine.platform,
        "cpu": {"brand_raw": machine.processor, "count": machine.cpu_count},
    }


def _benchmark(row: LatencyRow, arm: str, samples: LatencySamples) -> dict[str, Any]:
    name = f"{row.shape_name} [{arm}]"
    return {
        "group": row.shape_name,
        "name": name,
        "fullname": f"depthcut::{name}",
        "params": {"arm": arm},
        "param": arm,
        "extra_info": {"speedup": row.speedup.ratio, "verdict": row.verdict},
        "options": {
            "disable_gc": True,
            "timer": "perf_counter",
            "min_rounds": row.rounds,
            "max_time": row.seconds or 0.0,
            "min_time": 0.0,
            "warmup": True,
        },
        "stats": _statistics(samples),
    }


def _statistics(samples: LatencySamples) -> dict[str, Any]:
    seconds = [value / 1000 for value in samples.samples_ms]
    mean = statistics.fmean(seconds)
    deviation = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    q1, q3 = (bound / 1000 for bound in quartiles(samples))
    fence = 1.5 * (q3 - q1)
    inside = [value for value in seconds if q1 - fence <= value <= q3 + fence]
    far = sum(abs(value - mean) > deviation for value in seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(seconds),
        "median": samples.median_ms / 1000,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": len(seconds) - len(inside),
        "stddev_outliers": far,
        "outliers": f"{far};{len(seconds) - len(inside)}",
        "ld15iqr": min(inside),
        "hd15iqr": max(inside),
        "ops": 1 / mean,
        "total": sum(seconds),
        "iterations": 1,
    }
