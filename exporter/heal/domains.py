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
"""Of what dropping costs; what gives back less has gained nothing worth its cost."""
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


def warnings_of(texts: Sequence[HealedText], read: Nouns = TEXTS) -> list[str]:
    """What a reader must know before trusting the gain: it is nothing somewhere, or elsewhere."""
    best = max((text.gained_share or 0.0 for text in texts), default=0.0)
    weak = [text.text.source for text in texts if not _is_sure(text, _ALIKE * best)]
    warnings = []
    if weak:
        words = ", ".join(
            f"on {text.text.source} {text.gain_words}{_further(text)}" for text in texts
        )
        warnings.append(
            f"Healing gained little, or nothing sure, on {' and '.join(weak)}; of what dropping "
            f"costs it gives back {words}. Measure on more {read.much} (--samples), or "
            f"calibrate on {read.much} as in the intended use, or on a mixture."
        )
    if "other" not in {text.role for text in texts}:
        alone = "The gain was measured in the calibration's domain only"
        warnings.append(f"{alone}; others may gain nothing.")
    return warnings


def _is_sure(text: HealedText, least: float) -> bool:
    """Whether a gain is beyond its noise; the answers may not be further from the whole model's."""
    share, error = text.gained_share, text.gain_std_error or 0.0
    is_enough = share is None or share >= max(_LEAST_SHARE, least)
    return is_enough and text.gain > _STD_ERRORS * error and not _further(text)


def _further(text: HealedText) -> str:
    """That the answers are further from the whole model's than unhealed; empty where not."""
    kl = text.figures.get("kl")
    if kl is None or kl.healed <= kl.dropped:
        return ""
    return f", while the KL divergence rises from {kl.dropped:.3g} to {kl.healed:.3g} nats"
