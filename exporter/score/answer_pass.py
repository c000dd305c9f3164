"""The model's answers without each sublayer, for all metrics of answers at once."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.artifacts import Score
from exporter.artifacts.plans.stacks import Stacks
from exporter.models.ablation.branch_replacements import without_branches
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.meter import DamageMeter
from exporter.score.metric import UNITS, AnswerMetric
from exporter.score.scored_model import ScoredModel
from graph_passes.types import DeletionKind


def answer_scores(scored: ScoredModel, metrics: Sequence[AnswerMetric]) -> dict[str, list[Score]]:
    """The scores by each metric's name; every sublayer is skipped once.

    Whole blocks are skipped only where that is asked for: half as much work again.

    Raises:
        ScoringError: Logits are not finite, or no token has a next one to predict.
    """
    units = _units(scored)
    cuts = [without_branches([unit], scored.model) for unit in units]
    _, *damages = answer_meter(scored).measure_many({}, cuts, scored.progress)
    return scores_of_damages(metrics, units, damages)


def answer_meter(scored: ScoredModel) -> DamageMeter:
    """What runs the model's text; it keeps nothing between calls.

    Raises:
        ScoringError: The model has no language head, or no token has a next one to predict.
    """
    return DamageMeter(
        scored.model,
        scored.text.input_ids,
        scored.text.mask,
        batch_size=scored.batch_size,
        positions=scored.positions,
        kept_bytes=0,
        sources=scored.text.sources,
    )


def _units(scored: ScoredModel) -> list[tuple[int, DeletionKind]]:
    """What is skipped of a model of one stack or of two."""
    if scored.text.sources is None:
        return answer_units(len(scored.layers), blocks=scored.blocks)
    stacks = Stacks.of(scored.model.config)
    kinds = stacks.units if scored.blocks else stacks.kinds
    return [(layer, kind) for layer in range(stacks.layers) for kind in kinds(layer)]


def answer_units(num_layers: int, *, blocks: bool) -> list[tuple[int, DeletionKind]]:
    """What is skipped, each alone, in the order of the scores."""
    kinds = UNITS if blocks else UNITS[:2]
    return [(layer, kind) for layer in range(num_layers) for kind in kinds]


def scores_of_damages(
    metrics: Sequence[AnswerMetric],
    units: Sequence[tuple[int, DeletionKind]],
    damages: Sequence[Damage],
) -> dict[str, list[Score]]:
    """The scores by each metric's name.

    Args:
        metrics: What judges the damages.
        units: What was skipped, as :func:`answer_units` has it.
        damages: Over all samples, of each of them.
    """
    found: dict[str, list[Score]] = {}
    for metric in metrics:
        judged = [(*unit, *metric.of(damage)) for unit, damage in zip(units, damages, strict=True)]
        found[metric.name] = [
            Score(layer=layer, kind=kind, score=value, std_error=error)
            for layer, kind, value, error in judged
        ]
    return found
