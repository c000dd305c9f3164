"""A GitLab metrics report: OpenMetrics text, for ``artifacts: reports: metrics``.

Test results go to GitLab as JUnit XML (:mod:`exporter.report.ci.junit`).
"""

from __future__ import annotations

import re

from exporter.report.ci import Checked
from exporter.report.ci.metrics import CiMetric, metrics

_UNITS = {"%": "percent", "x": "ratio", "": ""}


def render(checked: Checked) -> str:
    """The whole file; samples of one metric stand together, as the format wants."""
    by_name: dict[str, list[CiMetric]] = {}
    for metric in metrics(checked.report):
        by_name.setdefault(_name(metric), []).append(metric)
    lines = []
    for name, found in by_name.items():
        lines += [f"# TYPE {name} gauge"]
        lines += [f'{name}{{of="{_label(m.subject)}"}} {m.value:.6g}' for m in found]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _name(metric: CiMetric) -> str:
    unit = _UNITS.get(metric.unit, metric.unit)
    words = ["depthcut", metric.measure, *([unit] if unit else [])]
    return re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(words))


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
