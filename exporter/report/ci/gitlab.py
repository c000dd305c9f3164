"""A GitLab metrics report: OpenMetrics text, for ``artifacts: reports: metrics``.

Test results go to GitLab as JUnit XML (:mod:`exporter.report.ci.junit`).
"""

from __future__ import annotations

import re

from exporter.artifacts import ComparisonReport
from exporter.report.ci.figures import Figure, figures

_UNITS = {"%": "percent", "x": "ratio", "": ""}


def render(report: ComparisonReport) -> str:
    """The whole file; samples of one metric stand together, as the format wants."""
    by_name: dict[str, list[Figure]] = {}
    for figure in figures(report):
        by_name.setdefault(_name(figure), []).append(figure)
    lines = []
    for name, found in by_name.items():
        lines += [f"# TYPE {name} gauge"]
        lines += [f'{name}{{of="{_label(f.subject)}"}} {f.value:.6g}' for f in found]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _name(figure: Figure) -> str:
    unit = _UNITS.get(figure.unit, figure.unit)
    words = ["depthcut", figure.measure, *([unit] if unit else [])]
    return re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(words))


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
