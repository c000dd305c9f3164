"""Iterative choice: the lowest score goes, and the pruned model is scored again.

One-shot scores are of the whole model; once a sublayer is gone, those behind it read another
stream. Here the score is taken again after every drop, or every few. A dropped attention leaves its
MLP alive and scored, unlike the reference code of LLM-Drop (arXiv 2406.15786), which scores a layer
no more once a part of it is gone.

Cost: a scoring pass for each re-scoring; nothing is kept between runs, since that is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from exporter.artifacts import Score
from exporter.choose.selection.options import (
    Option,
    cut_of_options,
    most_sublayers,
    reaches,
    refuse_unreachable,
    total_gain,
)
from exporter.errors import PlanError
from exporter.models.ablation import BranchReplacements
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef, sublayer_kinds

Rescore = Callable[[BranchReplacements], Iterable[Score]]
"""Scores the model with a cut."""


def iterative(
    rescore: Rescore,
    options: Sequence[Option],
    *,
    goal: float,
    num_layers: int,
    every: int = 1,
    first: Iterable[Score] | None = None,
    start: BranchReplacements | None = None,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> list[Option]:
    """Chooses the option of the lowest score, scores again, and so on until the goal.

    Args:
        rescore: Scores the model with a cut.
        options: What may be dropped.
        goal: The gain to reach.
        num_layers: How many layers the model has.
        every: So many are dropped between two scorings.
        first: Scores of the model with ``start`` cut, where they are known.
        start: What is cut before.
        allow_all: Lets every sublayer go.
        progress: Told of every drop.

    Returns:
        The options in the order of choice.

    Raises:
        PlanError: When the goal is out of reach, or a score is not finite.
    """
    begun = dict(start or {})
    options = [option for option in options if not set(option.names) & set(begun)]
    refuse_unreachable(options, goal, most_sublayers(num_layers, allow_all) - len(begun))
    taken: list[Option] = []
    scores = None if first is None else _by_names(first)
    while not reaches(total_gain(taken), goal):
        if scores is None or (taken and len(taken) % every == 0):
            scores = _by_names(rescore(cut_of_options(taken, begun)))
        best = min(_left(options, taken), key=lambda o: (_score(o, scores), o.names))
        taken.append(best)
        progress.detail(f"search: {best}: score {_score(best, scores):.4f}")
    return taken


def _left(options: Sequence[Option], taken: Sequence[Option]) -> list[Option]:
    gone = {name for option in taken for name in option.names}
    return [option for option in options if not gone & set(option.names)]


def _by_names(scores: Iterable[Score]) -> Mapping[tuple[SublayerRef, ...], float]:
    return {
        tuple(SublayerRef(s.layer, kind) for kind in sublayer_kinds(s.kind)): s.score
        for s in scores
    }


def _score(option: Option, scores: Mapping[tuple[SublayerRef, ...], float]) -> float:
    score = scores.get(option.names)
    if score is None or not math.isfinite(score):
        raise PlanError(
            f"The score of {option} is {'missing' if score is None else score}; it can't be "
            "ranked.",
            "Score the model again.",
        )
    return score
