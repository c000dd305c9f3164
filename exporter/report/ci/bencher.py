"""Bencher Metric Format: benchmark, measure, ``value`` with ``lower_value`` and ``upper_value``.

Bencher's own measure ``latency`` is in nanoseconds; a time's bounds are its quartiles, a speedup's
its 95 % interval. https://bencher.dev/docs/reference/bencher-metric-format
"""

from __future__ import annotations

import json

from exporter.report.ci import Checked
from exporter.report.ci.metrics import CiMetric, metrics

_NANOSECONDS = 1e6


def render(checked: Checked) -> str:
    """The whole file, for ``bencher run --adapter json --file``."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for metric in metrics(checked.report):
        found.setdefault(metric.subject, {})[metric.measure] = _values(metric)
    return json.dumps(found, indent=2) + "\n"


def _values(metric: CiMetric) -> dict[str, float]:
    factor = _NANOSECONDS if metric.unit == "ms" else 1
    values = {"value": metric.value, "lower_value": metric.low, "upper_value": metric.high}
    return {name: value * factor for name, value in values.items() if value is not None}
