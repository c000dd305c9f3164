"""From what a user says a plan shall hold to the plan. Importing this costs no PyTorch."""

from exporter.choose.budgets.budget import Budget, Floors, Memory
from exporter.choose.budgets.figures import Outcome
from exporter.choose.budgets.inputs import Workplace
from exporter.choose.budgets.planner import Planner
from exporter.choose.budgets.search import Search
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.budgets.target_speedup import (
    OnnxStopwatch,
    SpeedupVerdict,
    Stopwatch,
    speedup_verdict,
)

__all__ = [
    "Budget",
    "Floors",
    "Memory",
    "OnnxStopwatch",
    "Outcome",
    "PlanSettings",
    "Planner",
    "Search",
    "SpeedupVerdict",
    "Stopwatch",
    "Workplace",
    "speedup_verdict",
]
