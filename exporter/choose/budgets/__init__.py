"""From what a user says a plan shall hold to the plan. Importing this costs no PyTorch."""

from exporter.choose.budgets.budget import Budget, Floors, Memory, tokens
from exporter.choose.budgets.outcome import Outcome
from exporter.choose.budgets.planner import Planner
from exporter.choose.budgets.search import Search
from exporter.choose.budgets.settings import PlanSettings
from exporter.choose.budgets.stopwatch import OnnxStopwatch, Stopwatch
from exporter.choose.budgets.verdict import SpeedupVerdict, speedup_verdict
from exporter.choose.budgets.workplace import Workplace

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
    "tokens",
]
