"""The model's answers without each sublayer, for all metrics of answers at once."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.ablation import DamageMeter, cut_of
from exporter.artifacts import Score
from exporter.importance.metric import UNITS, AnswerMetric
from exporter.importance.subject import Subject


def answer_scores(subject: Subject, metrics: Sequence[AnswerMetric]) -> list[list[Score]]:
    """The scores by each metric; every sublayer is skipped once.

    Whole blocks are skipped only where the subject asks for it: half as much work again.

    Raises:
        ScoringError: Logits are not finite, or no token has a next one to predict.
    """
    meter = DamageMeter(
        subject.model,
        subject.text.input_ids,
        subject.text.mask,
        batch_size=subject.batch_size,
        positions=subject.positions,
        kept_bytes=0,
    )
    kinds = UNITS if subject.blocks else UNITS[:2]
    names = [(layer, kind) for layer in range(meter.num_layers) for kind in kinds]
    cuts = [cut_of([name], subject.model) for name in names]
    _, *damages = meter.measure_many({}, cuts, subject.progress)
    return [
        [
            Score(
                layer=layer,
                kind=kind,
                score=metric.value(damage),
                std_error=metric.std_error(damage),
            )
            for (layer, kind), damage in zip(names, damages, strict=True)
        ]
        for metric in metrics
    ]
