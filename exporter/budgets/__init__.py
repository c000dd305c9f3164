"""From what a user says a plan shall hold to the plan. Importing this costs no PyTorch."""

from exporter.budgets.amounts import tokens
from exporter.budgets.budget import Budget, Floors, Heal, Memory
from exporter.budgets.outcome import Outcome
from exporter.budgets.planner import Planner
from exporter.budgets.search import Search, SearchSettings
from exporter.budgets.settings import PlanSettings
from exporter.budgets.stopwatch import OnnxStopwatch, Stopwatch
from exporter.budgets.verdict import SpeedupVerdict, speedup_verdict
from exporter.budgets.workplace import Workplace

__all__ = [
    "Budget",
    "Floors",
    "Heal",
    "Memory",
    "OnnxStopwatch",
    "Outcome",
    "PlanSettings",
    "Planner",
    "Search",
    "SearchSettings",
    "SpeedupVerdict",
    "Stopwatch",
    "Workplace",
    "speedup_verdict",
    "tokens",
]
