"""What a planner hands over: the plan, the numbers of its replacements, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from exporter.artifacts import HealingReport, PruningPlan, Speedup
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.walk import Walk, damage_words
from exporter.choose.costs import CostTable, GraphSizes
from exporter.models.ablation import BranchReplacement, Damage
from exporter.report.sections.healing import healing_words
from graph_passes.types import SublayerRef

_TEXTS = {"checked": "the text that decided", "searched": "the text of the search"}


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan that holds its budget.

    Attributes:
        plan: The plan; it names no file of replacements yet.
        branch_replacements: What takes each branch's place, where anything may.
        damage: On the tokens that are reported on; None where none was measured.
        speedup: What the finished candidate measured; None where none was timed.
        healing: What the replacements gain, in two domains; None without any.
    """

    plan: PruningPlan
    branch_replacements: Mapping[SublayerRef, BranchReplacement] = field(default_factory=dict)
    damage: Damage | None = None
    speedup: Speedup | None = None
    healing: HealingReport | None = None

    def words(self) -> str:
        """Its figures in a line; empty where nothing was measured."""
        figures = self.plan.predicted
        if self.damage is None:
            return "" if self.healing is None else healing_words(self.healing.healing)
        told = damage_words(self.damage)
        if self.speedup is not None:
            low, high = self.speedup.ci95
            told = f"speedup {self.speedup.ratio:.3f} [{low:.3f}, {high:.3f}] as measured; {told}"
        elif "speedup" in figures:
            told = f"speedup {figures['speedup']:.3f} by the costs, not measured; {told}"
        if "other_log_perplexity_increase" in figures:
            rise = math.expm1(min(figures["other_log_perplexity_increase"], 50.0))
            told += f" (perplexity in the other domain {rise:+.1%})"
        if self.plan.predicted_on != "unseen":
            told += f" (on {_TEXTS[self.plan.predicted_on or 'searched']}: rather too good)"
        return told + self._parameters()

    def _parameters(self) -> str:
        """What is left of them, and the share that went."""
        figures = self.plan.predicted
        if "parameters" not in figures:
            return ""
        left, whole = figures["parameters"], figures["parameters_before"]
        change = f"{whole / 1e6:,.2f} -> {left / 1e6:,.2f} million ({left / whole - 1:+.1%})"
        return f"; parameters {change}"


def damage_figures(damage: Damage) -> dict[str, float]:
    """What a plan says of its damage, with standard errors as far as they are known."""
    names = ("kl", "log_perplexity_increase", "top1_agreement")
    errors = ("kl_std_error", "log_perplexity_increase_std_error")
    found = {name: getattr(damage, name) for name in (*names, *errors)}
    return {name: float(value) for name, value in found.items() if value is not None}


def predicted(
    budget: Budget,
    walk: Walk,
    damage: Damage,
    sizes: GraphSizes,
    costs: CostTable | None,
    rank: int | None,
    speedup: Speedup | None,
) -> dict[str, float]:
    """A plan's figures.

    Args:
        budget: Says how much the caches hold.
        walk: What is done.
        damage: On the tokens that are reported on.
        sizes: Of the sublayers.
        costs: Their times, if they are known.
        rank: Of linear maps.
        speedup: What the finished candidate measured.
    """
    room = budget.fits
    context, batch = (room.context, room.batch) if room else (0, 1)
    choices = walk.choices
    found = {
        **damage_figures(damage),
        "parameters": float(sizes.total_parameters(choices, rank)),
        "parameters_before": float(sizes.parameters),
        "bytes": float(sizes.total_bytes(choices, rank, context=context, batch=batch)),
        "speedup": None if costs is None else costs.speedup(choices),
    }
    if speedup is not None:
        low, high = speedup.ci95
        found |= {
            "measured_speedup": speedup.ratio,
            "measured_speedup_low": low,
            "measured_speedup_high": high,
        }
    return {name: float(value) for name, value in found.items() if value is not None}
