"""What healing gained, in the calibration's domain and in another, and whether the two agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from exporter.artifacts import AnswerDamage, HealedClasses, HealedEmbeddings, HealedText, Healing
from exporter.artifacts.base import TEXTS, Nouns
from exporter.artifacts.healing import Role
from exporter.compare.intervals import mean_interval, share_interval
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import (
    SIMILARITY,
    AnyDamage,
    ClassDamage,
    Damage,
    EmbeddingDamage,
    Sums,
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
Measured = HealedText | HealedEmbeddings | HealedClasses
Lost = Callable[[Measured], bool]
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
) -> Measured:
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
) -> tuple[AnyDamage, AnyDamage]:
    """The damage of both cuts; the whole model runs once."""
    if within is None:
        before, after = meter.measure_many(dropped, [healed])
        return before, after
    return meter.measure(dropped), meter.inside(within).measure(healed)


def _told(
    role: Role, text: CalibrationText, befores: Sequence[Any], afters: Sequence[Any]
) -> Measured:
    before, after = (joined(parts).by_document(text.clusters) for parts in (befores, afters))
    if isinstance(before, EmbeddingDamage):
        measured: Measured = _healed_embeddings(role, text, before, after)
        counts = after.texts
    else:
        make = _healed_classes if isinstance(before, ClassDamage) else _healed_text
        measured, counts = make(role, text, before, after), after.positions
    known = np.count_nonzero(counts) > 1
    return measured.model_copy(update={"degrees": degrees_of_freedom(counts) if known else None})


def _healed_embeddings(
    role: Role, text: CalibrationText, before: EmbeddingDamage, after: EmbeddingDamage
) -> HealedEmbeddings:
    gains = after.cosines - before.cosines
    return HealedEmbeddings(
        role=role,
        text=text.ref,
        dropped=before.cosine,
        healed=after.cosine,
        gain=ratio(gains, after.texts),
        gain_std_error=ratio_std_error(gains, after.texts),
        dropped_correlation=_or_none(before.correlation),
        healed_correlation=_or_none(after.correlation),
        healed_ci95=ends_95(after.sums()["cosine"]),
        healed_correlation_ci95=ends_95(after.sums()[SIMILARITY]),
    )


def ends_95(sums: Sums) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None of too few samples."""
    interval = (share_interval if sums.is_share else mean_interval)(sums.values, sums.counts)
    return None if interval is None else interval.ci95


def _or_none(value: float | None) -> float | None:
    """A figure of pairs; None where there were none."""
    return None if value is None or math.isnan(value) else value


def _healed_classes(
    role: Role, text: CalibrationText, before: ClassDamage, after: ClassDamage
) -> HealedClasses:
    gains = before.kl_sums - after.kl_sums
    return HealedClasses(
        role=role,
        text=text.ref,
        dropped_kl=before.kl,
        dropped_same=before.top1_agreement,
        healed_kl=after.kl,
        healed_same=after.top1_agreement,
        healed_same_ci95=ends_95(after.sums()["top1_agreement"]),
        gain=before.kl - after.kl,
        gain_std_error=ratio_std_error(gains, before.positions),
    )


def _healed_text(role: Role, text: CalibrationText, before: Damage, after: Damage) -> HealedText:
    gains = before.nll_sums - after.nll_sums
    return HealedText(
        role=role,
        text=text.ref,
        baseline_perplexity=before.baseline_perplexity,
        dropped=_damage(before),
        healed=_damage(after),
        gain=ratio(gains, before.positions),
        gain_std_error=ratio_std_error(gains, before.positions),
    )


def _damage(damage: Damage) -> AnswerDamage:
    ends = {f"{key}_ci95": ends_95(sums) for key, sums in damage.sums().items()}
    values: dict[str, Any] = {**damage.figures(), **ends}
    return AnswerDamage(perplexity=damage.perplexity, **values)


def predicted_by(healing: Healing) -> dict[str, float]:
    """What the plan says of itself: the healed model in the calibration's domain."""
    measured = healing.of_role("calibration")
    figures = {} if measured is None else measured.figures
    return {key: one.healed for key, one in figures.items() if one.healed is not None}


def gain_warnings(texts: Sequence[HealedEmbeddings | HealedClasses]) -> list[str]:
    """What a reader must know before he trusts the gain of embeddings or of classes."""
    if not texts:
        return []
    roles = {text.role for text in texts}
    names = [f"Healing gained almost nothing on {embeddings.text.source}." for embeddings in texts
             if embeddings.gain <= _STD_ERRORS * (embeddings.gain_std_error or 0.0)]  # fmt: skip
    return names if "other" in roles else [_ONE_DOMAIN, *names]


_ONE_DOMAIN = "The gain was measured in the calibration's domain only; others may gain nothing."


def warnings_of(texts: Sequence[HealedText], read: Nouns = TEXTS) -> list[str]:
    """What a reader must know before trusting the gain: domains disagree, or no gain at all."""
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
        further = text.healed.kl > text.dropped.kl
        self.text, self.amount = text, text.gain if share is None else share
        self.name = f"{text.text.source} ({ends[text.role]})"
        self.seems = text.gain > 0 and (share is None or share >= _LEAST_SHARE) and not further
        self.is_sure = self.seems and text.gain > _STD_ERRORS * (text.gain_std_error or 0.0)
        self.words = f"{text.gain:+.3f} nats" if share is None else f"{100 * share:.0f} %"
        if further:
            self.words += f" (and KL rises from {text.dropped.kl:.3g} to {text.healed.kl:.3g} nats)"
