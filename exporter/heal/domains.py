"""What healing gained, in the calibration's domain and in another, and whether the two agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from exporter.artifacts import HealedFigure, HealedText, Healing
from exporter.artifacts.base import TEXTS, Nouns
from exporter.artifacts.healing import Role
from exporter.artifacts.plan_figures import PlanFigure
from exporter.compare.intervals import mean_interval, share_interval
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import (
    BySample,
    Damage,
    degrees_of_freedom,
    joined,
    ratio,
    ratio_std_error,
)
from exporter.models.ablation.meter import CutMeter, Within
from exporter.models.tasks import Task, task_of
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress

_LEAST_SHARE = 0.05
"""Of the increase in log-perplexity; what takes back less has gained nothing worth its cost."""
_STD_ERRORS = 2.0
_ALIKE = 1 / 3
"""Where one domain's share of the gain is below this part of the other's, they disagree."""
Lost = Callable[[HealedText], bool]
"""Whether what was measured shows that a cut is not worth measuring on."""


def measured_text(
    model: Any,
    role: Role,
    text: CalibrationText,
    dropped: BranchReplacements,
    healed: BranchReplacements,
    *,
    batch_size: int = 4,
    within: Within | None = None,  # None: they are the same
    lost: Lost | None = None,
    progress: Progress = QUIET,
) -> HealedText:
    """Measures both cuts on one text, against the whole model."""
    befores: list[Any] = []
    afters: list[Any] = []
    judging: Task[Any] = task_of(model)
    batch_size = judging.batch_size(batch_size)
    starts = range(0, len(text.input_ids), batch_size)
    with progress.task("measure the healed cut", total=len(starts), unit="batches") as task:
        for start in starts:
            part = text.rows(slice(start, start + batch_size))
            meter = judging.meter(
                part.input_ids,
                part.mask,
                batch_size=batch_size,
                sources=part.sources,
                types=part.types,
            )
            before, after = _both(meter, dropped, healed, within)
            befores.append(before)
            afters.append(after)
            task.advance()
            measured = _told(role, text.rows(slice(0, start + batch_size)), befores, afters)
            if lost is not None and lost(measured):
                break
    return measured


def _both(
    meter: CutMeter[Any],
    dropped: BranchReplacements,
    healed: BranchReplacements,
    within: Within | None,
) -> tuple[BySample, BySample]:
    """The damage of both cuts; the whole model runs once."""
    if within is None:
        before, after = meter.measure_many(dropped, [healed])
        return before, after
    return meter.measure(dropped), meter.inside(within).measure(healed)


def _told(
    role: Role, text: CalibrationText, befores: Sequence[Any], afters: Sequence[Any]
) -> HealedText:
    before, after = (joined(parts).by_document(text.clusters) for parts in (befores, afters))
    figures = {}
    for figure in before.kind.figures:
        key = figure.key
        old, new = before.value(key), after.value(key)
        if figure.is_minor and math.isnan(old + new):
            continue  # of pairs, of which there are none
        errors = None if figure.is_share else (before.std_error(key), after.std_error(key))
        figures[key] = HealedFigure(
            dropped=old,
            healed=new,
            ci95=None if figure.limit is None else ends_95(after, figure),
            std_errors=errors or (None, None),
        )
    first = before.kind.figures[0]
    (lost, counts), (left, _) = (damage.sums()[first.key] for damage in (before, after))
    gains = (left - lost) if first.higher_is_better else (lost - left)
    perplexities = None
    if isinstance(before, Damage):
        perplexities = before.baseline_perplexity, before.perplexity, after.perplexity
    return HealedText(
        role=role,
        text=text.ref,
        figures=figures,
        gain=ratio(gains, counts),
        gain_std_error=ratio_std_error(gains, counts),
        degrees=degrees_of_freedom(counts) if np.count_nonzero(counts) > 1 else None,
        perplexities=perplexities,
    )


def ends_95(damage: BySample, figure: PlanFigure) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None of too few samples."""
    interval = (share_interval if figure.is_share else mean_interval)(*damage.sums()[figure.key])
    return None if interval is None else interval.ci95


def predicted_by(healing: Healing) -> dict[str, float]:
    """What the plan says of itself: the healed model in the calibration's domain."""
    measured = healing.of_role("calibration")
    return {} if measured is None else {k: one.healed for k, one in measured.figures.items()}


def _of_embeddings_or_classes(texts: Sequence[HealedText]) -> list[str]:
    roles = {text.role for text in texts}
    names = [f"Healing gained almost nothing on {text.text.source}." for text in texts
             if text.gain <= _STD_ERRORS * (text.gain_std_error or 0.0)]  # fmt: skip
    return names if "other" in roles else [_ONE_DOMAIN, *names]


_ONE_DOMAIN = "The gain was measured in the calibration's domain only; others may gain nothing."


def warnings_of(texts: Sequence[HealedText], read: Nouns = TEXTS) -> list[str]:
    """What a reader must know before trusting the gain: domains disagree, or no gain at all."""
    if texts and texts[0].perplexities is None:
        return _of_embeddings_or_classes(texts)
    gains = {text.role: _Gain(text) for text in texts}
    own, other = gains.get("calibration"), gains.get("other")
    if own is None:
        return []
    if other is None:
        return [_ONE_DOMAIN]
    unsure = [gain for gain in (own, other) if gain.seems and not gain.is_sure]
    if unsure and own.seems and other.seems:
        result = " and ".join(
            f"on {gain.name} ({gain.text.gain:+.3f} ± {gain.text.gain_std_error or 0.0:.3f} nats)"
            for gain in unsure
        )
        return [
            f"The gain may be chance {result}. Measure on more {read.much}: more --samples, or for "
            "a budget more samples of the scores."
        ]
    if not own.is_sure and not other.is_sure:
        return ["Healing gained almost nothing in either domain."]
    worse, better = sorted((own, other), key=lambda gain: (gain.is_sure, gain.amount))
    shares = worse.text.gained_share, better.text.gained_share
    if worse.is_sure and (None in shares or worse.amount >= _ALIKE * better.amount):
        return []
    return [
        f"The domains disagree: on {better.name} healing recovers {better.words} of the "
        f"lost log-perplexity, on {worse.name} {worse.words}. Calibrate on {read.much} "
        "as in the intended use, or on a mixture."
    ]


class _Gain:
    """What healing took back on one text."""

    def __init__(self, text: HealedText) -> None:
        share, ends = text.gained_share, {"calibration": "held out", "other": "other domain"}
        # However likely the text may be, the answers may be further from the whole model's.
        kl = text.figures["kl"]
        further = kl.healed > kl.dropped
        self.text, self.amount = text, text.gain if share is None else share
        self.name = f"{text.text.source} ({ends[text.role]})"
        self.seems = text.gain > 0 and (share is None or share >= _LEAST_SHARE) and not further
        self.is_sure = self.seems and text.gain > _STD_ERRORS * (text.gain_std_error or 0.0)
        self.words = f"{text.gain:+.3f} nats" if share is None else f"{100 * share:.0f} %"
        if further:
            self.words += f" (and KL rises from {kl.dropped:.3g} to {kl.healed:.3g} nats)"
