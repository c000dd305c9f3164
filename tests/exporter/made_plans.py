"""Planners of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.choose.budgets.budget import Budget, SearchOptions
from exporter.choose.budgets.figures import Outcome
from exporter.choose.budgets.inputs import PlanInputs
from exporter.choose.budgets.planner import make
from exporter.choose.budgets.settings import PlanSettings

_OWN = ("stopwatch", "costs", "sizes", "importance_sha256", "cache_dir", "progress")


class Planner(PlanInputs):
    """Inputs that make their plan."""

    def plan(self) -> Outcome:
        return make(self)


def made_planner(
    loaded: Any, report: Any, work: Path, budget: Budget, search: Any = "greedy", **more: Any
) -> Planner:
    """Of a model and its scores; a search may be named, ``more`` are settings or its own."""
    options = search if isinstance(search, SearchOptions) else SearchOptions(search=search)
    own = {name: more.pop(name) for name in _OWN if name in more}
    settings = PlanSettings(options, **more)
    return Planner(report, lambda: loaded, budget, settings, work=work, **own)


def names_of(plan: Any) -> list[tuple[int, str]]:
    """What a plan drops, in its order."""
    return [(deletion.layer, deletion.kind) for deletion in plan.deletions]
