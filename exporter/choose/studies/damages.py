"""The damage of a cut, as a study's file tells it."""

from __future__ import annotations

import math

from exporter.artifacts import DepthDamage
from exporter.choose.budgets.ladder import HIGH
from exporter.compare.quality.intervals import mean_interval
from exporter.models.ablation.damage import Damage
from exporter.models.texts.calibration import CalibrationText

_MOST_LOG = 700.0


def depth_damage(damage: Damage, text: CalibrationText, looks: int = 1) -> DepthDamage:
    """A cut's damage with 95 % intervals.

    Args:
        damage: On a text.
        text: Its samples.
        looks: How many such figures a cut is chosen by.
    """
    increase, documents = damage.nll_sums - damage.baseline_nll_sums, text.clusters
    rise = mean_interval(increase, damage.positions, documents)
    corrected = mean_interval(increase, damage.positions, documents, looks=looks)
    kl = mean_interval(damage.kl_sums, damage.positions, documents, positive=True)
    return DepthDamage(
        perplexity=damage.perplexity,
        perplexity_ratio=_exp(damage.log_perplexity_increase),
        perplexity_ratio_ci95=None if rise is None else (_exp(rise.ci95[0]), _exp(rise.ci95[1])),
        perplexity_ratio_most=None if corrected is None else _exp(corrected.ci95[1]),
        kl=damage.kl,
        kl_ci95=None if kl is None else (max(0.0, kl.ci95[0]), kl.ci95[1]),
        top1_agreement=damage.top1_agreement,
    )


def limit_figures(damage: DepthDamage) -> dict[str, float]:
    """What limits on quality are held against, as a plan has it in ``predicted``.

    Without an interval, of a single sample, nothing is certain.
    """
    return {
        "log_perplexity_increase": math.log(damage.perplexity_ratio),
        HIGH: math.log(damage.perplexity_ratio_most or math.inf),
        "top1_agreement": damage.top1_agreement,
    }


def _exp(value: float) -> float:
    return math.exp(max(-_MOST_LOG, min(_MOST_LOG, value)))
