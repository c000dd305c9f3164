"""The exit code of a call that requires its target speedup: those of `depthcut check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from exporter.cli.console import echo

if TYPE_CHECKING:
    from exporter.artifacts import PruningPlan

MISSED, UNPROVEN = 1, 3


def end_by_speedup(plan: PruningPlan) -> None:
    """Ends the command with a word where its plan was not shown to reach the target speedup.

    Args:
        plan: Made for one, and written.
    """
    from exporter.choose.budgets import speedup_verdict

    verdict, figures = speedup_verdict(plan), plan.predicted
    if verdict == "held":
        return
    names = ("measured_speedup", "measured_speedup_low", "measured_speedup_high")
    measured, low, high = (f"{figures.get(name, float('nan')):.3f}" for name in names)
    target = f"{plan.budget['target_speedup']:g}"
    told = f"is not reached: {measured} [{low}, {high}] was measured."
    if verdict == "unproven":
        told = f"is not shown: {measured} was measured, and its interval is [{low}, {high}]."
    echo(f"depthcut: The required speedup of {target} {told}", err=True)
    click.get_current_context().exit(MISSED if verdict == "missed" else UNPROVEN)
