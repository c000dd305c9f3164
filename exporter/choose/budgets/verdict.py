"""Whether a plan has the speedup that was asked for, as far as was measured."""

from __future__ import annotations

from typing import Literal

from exporter.artifacts import PruningPlan
from exporter.choose.budgets.hit import TOLERANCE

SpeedupVerdict = Literal["held", "missed", "unproven"]


def speedup_verdict(plan: PruningPlan) -> SpeedupVerdict:
    """Holds what a plan's candidate measured against the target, as `depthcut check` would.

    More than the target holds it too; what lies within the tolerance below it counts as reached.

    Args:
        plan: Made for a target speedup.

    Returns:
        ``held`` or ``missed`` where all of the 95 % interval says so; else ``unproven``.
    """
    least = float(plan.budget["target_speedup"]) * (1 - TOLERANCE)
    figures = plan.predicted
    low = figures.get("measured_speedup_low", 0.0)
    high = figures.get("measured_speedup_high", float("inf"))
    if low >= least:
        return "held"
    return "missed" if high < least else "unproven"
