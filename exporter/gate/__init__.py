"""The gate: has the candidate become slower, worse or larger than it may?

In come a report, limits, and a baseline or a history; out comes a verdict on each quantity and on
all. ``times``, ``quality`` and ``gate`` make a value with its interval of what reports hold, and
``verdicts`` one word of it. A limit is a field of :class:`Limits`, and a value made there.
"""

from exporter.gate.baselines import find_baseline, read_baselines, updated
from exporter.gate.gate import BaselineMatch, History, check, confirmed
from exporter.gate.limits import Limits
from exporter.gate.request import CheckRequest, run_check

__all__ = [
    "BaselineMatch",
    "CheckRequest",
    "History",
    "Limits",
    "check",
    "confirmed",
    "find_baseline",
    "read_baselines",
    "run_check",
    "updated",
]
