"""The model's answers without each sublayer, for all metrics of answers at once."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.artifacts import Score
from exporter.models.ablation import Damage, DamageMeter, without_branches
from exporter.score.metric import UNITS, AnswerMetric
from exporter.score.subject import Subject
from graph_passes.types import DeletionKind


def answer_scores(subject: Subject, metrics: Sequence[AnswerMetric]) -> list[list[Score]]:
    """The scores by each metric; every sublayer is skipped once.

    Whole blocks are skipped only where the subject asks for it: half as much work again.

    Raises:
        ScoringError: Logits are not finite, or no token has a next one to predict.
    """
    units = answer_units(len(subject.layers), blocks=subject.blocks)
    cuts = [without_branches([unit], subject.model) for unit in units]
    _, *damages = answer_meter(subject).measure_many({}, cuts, subject.progress)
    return scores_of_damages(metrics, units, damages)


def answer_meter(subject: Subject) -> DamageMeter:
    """What runs the subject's text; it keeps nothing between calls.

    Raises:
        ScoringError: The model has no language head, or no token has a next one to predict.
    """
    return DamageMeter(
        subject.model,
        subject.text.input_ids,
        subject.text.mask,
        batch_size=subject.batch_size,
        positions=subject.positions,
        kept_bytes=0,
    )


def answer_units(num_layers: int, *, blocks: bool) -> list[tuple[int, DeletionKind]]:
    """What is skipped, each alone, in the order of the scores."""
    kinds = UNITS if blocks else UNITS[:2]
    return [(layer, kind) for layer in range(num_layers) for kind in kinds]


def scores_of_damages(
    metrics: Sequence[AnswerMetric],
    units: Sequence[tuple[int, DeletionKind]],
    damages: Sequence[Damage],
) -> list[list[Score]]:
    """The scores by each metric.

    Args:
        metrics: What judges the damages.
        units: What was skipped, as :func:`answer_units` has it.
        damages: Over all samples, of each of them.
    """
    return [
        [
            Score(
                layer=layer,
                kind=kind,
                score=metric.value(damage),
                std_error=metric.std_error(damage),
            )
            for (layer, kind), damage in zip(units, damages, strict=True)
        ]
        for metric in metrics
    ]
