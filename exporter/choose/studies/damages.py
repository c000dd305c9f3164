"""The damage of a cut, as a study's file tells it."""

from __future__ import annotations

import math

from exporter.artifacts import DepthDamage
from exporter.choose.budgets.ladder import HIGH
from exporter.compare.quality.intervals import mean_interval
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.ratios import Floats

_MOST_LOG = 700.0


def depth_damage(damage: Damage) -> DepthDamage:
    """A cut's damage with 95 % intervals, Student's t over samples."""
    increase = damage.nll_sums - damage.baseline_nll_sums
    ratio = _interval(increase, damage.positions)
    kl = _interval(damage.kl_sums, damage.positions)
    return DepthDamage(
        perplexity=damage.perplexity,
        perplexity_ratio=_exp(damage.log_perplexity_increase),
        perplexity_ratio_ci95=None if ratio is None else (_exp(ratio[0]), _exp(ratio[1])),
        kl=damage.kl,
        kl_ci95=None if kl is None else (max(0.0, kl[0]), kl[1]),
        top1_agreement=damage.top1_agreement,
    )


def limit_figures(damage: DepthDamage) -> dict[str, float]:
    """What limits on quality are held against, as a plan has it in ``predicted``.

    Without an interval, of a single sample, nothing is certain.
    """
    high = math.inf if damage.perplexity_ratio_ci95 is None else damage.perplexity_ratio_ci95[1]
    return {
        "log_perplexity_increase": math.log(damage.perplexity_ratio),
        HIGH: math.log(high),
        "top1_agreement": damage.top1_agreement,
    }


def _interval(sums: Floats, counts: Floats) -> tuple[float, float] | None:
    found = mean_interval(sums, counts)
    return None if found is None else found.ci95


def _exp(value: float) -> float:
    return math.exp(max(-_MOST_LOG, min(_MOST_LOG, value)))
