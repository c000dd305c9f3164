"""The exit code of a call that requires its target speedup: those of `depthcut check`."""

from __future__ import annotations

from exporter.artifacts import PruningPlan
from exporter.choose.budgets.budget import REACHING
from exporter.cli.console import echo
from exporter.options import Options, dataclass, option

MISSED, UNPROVEN = 1, 3


@dataclass(frozen=True)
class RequiredSpeedup(Options):
    """Whether a target speedup decides the exit code."""

    require_speedup: bool = option(
        False,
        "Exit with code 1 if the plan's measured speedup misses --faster, and with 3 "
        "if the measurement can't decide; the results are written in all cases.",
        brief="Exit code 1 or 3 if it is not proven",
        section=REACHING,
    )


def exit_code(plan: PruningPlan) -> int:
    """0, or with a word another where a plan was not shown to reach its target speedup."""
    from exporter.choose.budgets.target_speedup import speedup_verdict

    verdict, figures = speedup_verdict(plan), plan.predicted
    if verdict == "held":
        return 0
    names = ("measured_speedup", "measured_speedup_low", "measured_speedup_high")
    measured, low, high = (f"{figures.get(name, float('nan')):.3f}" for name in names)
    target = f"{plan.budget['target_speedup']:g}"
    told = f"is not reached: {measured} [{low}, {high}] was measured."
    if verdict == "unproven":
        told = f"is not shown: {measured} was measured, and its interval is [{low}, {high}]."
    echo(f"depthcut: The required speedup of {target} {told}", err=True)
    return MISSED if verdict == "missed" else UNPROVEN
