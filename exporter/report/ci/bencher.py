"""Bencher Metric Format: benchmark, measure, ``value`` with ``lower_value`` and ``upper_value``.

Bencher's own measure ``latency`` is in nanoseconds; a time's bounds are its quartiles, a speedup's
its 95 % interval. https://bencher.dev/docs/reference/bencher-metric-format
"""

from __future__ import annotations

import json

from exporter.artifacts import ComparisonReport
from exporter.report.ci.figures import Figure, figures

_NANOSECONDS = 1e6


def render(report: ComparisonReport) -> str:
    """The whole file, for ``bencher run --adapter json --file``."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for figure in figures(report):
        found.setdefault(figure.subject, {})[figure.measure] = _metric(figure)
    return json.dumps(found, indent=2) + "\n"


def _metric(figure: Figure) -> dict[str, float]:
    factor = _NANOSECONDS if figure.unit == "ms" else 1
    values = {"value": figure.value, "lower_value": figure.low, "upper_value": figure.high}
    return {name: value * factor for name, value in values.items() if value is not None}
