"""What a trial of a healed cut costs in quality, with intervals, from what its healing measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy import stats

from exporter.artifacts.healing import AnswerDamage, HealedClasses, HealedText, Healing
from exporter.choose.budgets.budget import Floors
from exporter.choose.budgets.ladder import BETTER_ENDS, ENDS, Rung
from exporter.errors import HealingError
from exporter.heal.domains import Measured
from exporter.models.ablation.damage import SIMILARITY

FEWEST_SEEN = 4
"""Samples on which a healed cut may be given up."""


def on_all_samples(rung: Rung, seen: int, whole: int) -> Rung:
    """A cut that was given up after some samples, with about the interval that all would give."""
    share = _reach(math.sqrt(seen / whole), whole) / _reach(1.0, seen)
    return replace(rung, high=rung.cost + share * (rung.high - rung.cost))


def figures_of(healing: Healing) -> tuple[dict[str, float], dict[str, float]]:
    """What a cut costs on held-out text of the domains that were fitted on, bare and healed.

    Of the healed one also the ends of each 95 % interval, such as
    ``log_perplexity_increase_high`` or ``cosine_low``.
    """
    held_out = held_out_of(healing)
    intervals = _intervals(held_out)
    ends = {ENDS[name]: worse for name, (_, worse) in intervals.items()}
    ends |= {BETTER_ENDS[name]: better for name, (better, _) in intervals.items()}
    bare, healed = _figures(held_out)
    return bare, healed | ends


def held_out_of(healing: Healing) -> Measured:
    """What was measured on text like that which was fitted on."""
    for each in healing.measured:
        if each.role == "calibration":
            return each
    raise HealingError(
        "There is no held-out text to measure a healed cut on.", "Give a longer --calibration."
    )


def is_lost(measured: Measured, floors: Floors, looks: int = 1) -> bool:
    """Whether all of the interval is beyond a limit, on a few samples at least.

    Args:
        measured: A healed cut on some samples.
        floors: The limits; agreement of tokens has no interval, and loses nothing.
        looks: How often that is asked of one cut: the errors of all together are at most 5 %
            (Bonferroni).
    """
    samples = measured.text.clusters
    if samples < FEWEST_SEEN:
        return False
    figures = _figures(measured)[1]
    wider = float(np.divide(*stats.t.ppf([1 - 0.025 / looks, 0.975], samples - 1)))
    best = {
        name: figures[name] + wider * (better - figures[name])
        for name, (better, _) in _intervals(measured).items()
    }
    held = floors if "top1_agreement" in best else replace(floors, top1_agreement=None)
    return held.used_up(best) > 1


def _figures(measured: Measured) -> tuple[dict[str, float], dict[str, float]]:
    """As a plan has them in ``predicted``, of the bare cut and of the healed one."""
    if isinstance(measured, HealedText):
        return _of_answers(measured.dropped), _of_answers(measured.healed)
    if isinstance(measured, HealedClasses):
        dropped, healed = measured.dropped_kl, measured.healed_kl
        return (
            {"kl": dropped, "top1_agreement": measured.dropped_same},
            {"kl": healed, "top1_agreement": measured.healed_same},
        )
    bare, found = {"cosine": measured.dropped}, {"cosine": measured.healed}
    if measured.dropped_correlation is not None:
        bare[SIMILARITY] = measured.dropped_correlation
    if measured.healed_correlation is not None:
        found[SIMILARITY] = measured.healed_correlation
    return bare, found


def _intervals(measured: Measured) -> dict[str, tuple[float, float]]:
    """By figure the 95 % interval of what the healed cut costs, the better end first."""
    samples = measured.text.clusters
    if isinstance(measured, HealedText):
        cost = measured.healed
        reach = _reach(cost.log_perplexity_increase_std_error, samples)
        rise = cost.log_perplexity_increase
        return {"log_perplexity_increase": (rise - reach, rise + reach)}
    if isinstance(measured, HealedClasses):
        low, high = measured.healed_same_ci95 or (measured.healed_same, measured.healed_same)
        return {"top1_agreement": (high, low)}
    kept = {"cosine": (measured.healed, measured.healed_std_error)}
    if measured.healed_correlation is not None:
        kept[SIMILARITY] = (measured.healed_correlation, measured.healed_correlation_std_error)
    return {
        name: (value + _reach(error, samples), value - _reach(error, samples))
        for name, (value, error) in kept.items()
    }


def _reach(error: float | None, samples: int) -> float:
    """Half of the 95 % interval of a mean over samples, by Student's t."""
    if error is None or not math.isfinite(error):
        return 0.0
    return error * float(stats.t.ppf(0.975, samples - 1))


def _of_answers(damage: AnswerDamage) -> dict[str, float]:
    names = ("kl", "log_perplexity_increase", "top1_agreement")
    return {name: float(getattr(damage, name)) for name in names}
