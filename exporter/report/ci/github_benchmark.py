"""JSON for github-action-benchmark (``tool: customSmallerIsBetter`` and ``customBiggerIsBetter``).

The action knows one direction a file, so there are two. ``range`` is only shown there; it compares
with the last point alone, which is why the gate is ``depthcut check`` and not the action.
"""

from __future__ import annotations

import json
from typing import Literal

from exporter.artifacts import ComparisonReport
from exporter.report.ci.figures import Figure, figures


def render(report: ComparisonReport, better: Literal["lower", "higher"]) -> str:
    """The file for one direction."""
    chosen = [figure for figure in figures(report) if figure.better == better]
    return json.dumps([_entry(figure, report) for figure in chosen], indent=2) + "\n"


def _entry(figure: Figure, report: ComparisonReport) -> dict[str, object]:
    entry: dict[str, object] = {
        "name": f"{figure.subject}: {figure.measure}",
        "unit": figure.unit or "1",
        "value": figure.value,
        "extra": f"{report.arms.candidate.backend}, {report.environment.processor}",
    }
    if figure.low is not None and figure.high is not None:
        entry["range"] = f"{figure.low:.4g} to {figure.high:.4g}"
    return entry
