"""What a planner hands over: the plan, the numbers of its replacements, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.artifacts import HealingReport, PruningPlan, Speedup
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.walk import Walk, damage_words
from exporter.choose.costs import CostTable, GraphSizes
from exporter.models.ablation import BranchReplacement, Damage
from graph_passes.types import SublayerRef

_TEXTS = {"checked": "the text that decided", "searched": "the text of the search"}


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan that holds its budget.

    Attributes:
        plan: The plan; it names no file of replacements yet.
        branch_replacements: What takes each branch's place.
        damage: On the tokens that are reported on.
        speedup: What the finished candidate measured; None where none was timed.
        healing: What the replacements gain, in two domains; None without any.
    """

    plan: PruningPlan
    branch_replacements: Mapping[SublayerRef, BranchReplacement]
    damage: Damage
    speedup: Speedup | None = None
    healing: HealingReport | None = None

    def words(self) -> str:
        """Its figures in a line."""
        told = damage_words(self.damage)
        figures = self.plan.predicted
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
        return f"{told}; {self._parameters()}"

    def _parameters(self) -> str:
        """What is left of them, and the share that went."""
        left, whole = (self.plan.predicted[name] for name in ("parameters", "parameters_before"))
        return (
            f"parameters {whole / 1e6:,.2f} -> {left / 1e6:,.2f} million ({left / whole - 1:+.1%})"
        )


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
        "kl": damage.kl,
        "kl_std_error": damage.kl_std_error,
        "log_perplexity_increase": damage.log_perplexity_increase,
        "log_perplexity_increase_std_error": damage.log_perplexity_increase_std_error,
        "top1_agreement": damage.top1_agreement,
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
