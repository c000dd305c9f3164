"""JSON for github-action-benchmark (``tool: customSmallerIsBetter`` and ``customBiggerIsBetter``).

The action knows one direction a file, so there are two. ``range`` is only shown there; it compares
with the last point alone, which is why the gate is ``depthcut check`` and not the action.
"""

from __future__ import annotations

import json

from exporter.artifacts import ComparisonReport
from exporter.report.ci import Checked
from exporter.report.ci.metrics import CiMetric, metrics


def render(checked: Checked) -> dict[str, str]:
    """A file for each direction."""
    found = metrics(checked.report)
    files = {
        name: [_entry(metric, checked.report) for metric in found if metric.better == better]
        for name, better in (("smaller.json", "lower"), ("bigger.json", "higher"))
    }
    return {name: json.dumps(entries, indent=2) + "\n" for name, entries in files.items()}


def _entry(metric: CiMetric, report: ComparisonReport) -> dict[str, object]:
    entry: dict[str, object] = {
        "name": f"{metric.subject}: {metric.measure}",
        "unit": metric.unit or "1",
        "value": metric.value,
        "extra": f"{report.arms.candidate.backend}, {report.environment.processor}",
    }
    if metric.low is not None and metric.high is not None:
        entry["range"] = f"{metric.low:.4g} to {metric.high:.4g}"
    return entry
