"""Choice by scores: the lowest go at once, or one by one with the pruned model scored in between.

One-shot scores are of the whole model; once a sublayer is gone, those behind it read another
stream. The iterative choice takes the score again after every drop, or every few. A dropped
attention leaves its MLP alive and scored, unlike the reference code of LLM-Drop (arXiv 2406.15786),
which scores a layer no more once a part of it is gone.

Cost of the iterative choice: a scoring pass for each re-scoring; nothing is kept between runs,
since that is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from exporter.artifacts import ImportanceReport, PruningPlan, Score
from exporter.artifacts.plans.by_score import plan_drop, refuse_unscored_blocks
from exporter.choose.selection.options import (
    Option,
    cut_of_options,
    most_sublayers,
    options_for,
    reaches,
    refuse_gain,
    total_gain,
)
from exporter.choose.selection.refusals import groups_of, refuse_number, refuse_too_many
from exporter.errors import PlanError
from exporter.models.ablation.branch_replacements import BranchReplacements, branches_replaced
from exporter.progress import QUIET, Progress
from exporter.score import CalibrationText, score_on
from graph_passes.types import SublayerRef, sublayer_kinds

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


def one_shot(
    report: ImportanceReport,
    counts: Mapping[str, int],
    protected: frozenset[SublayerRef] = frozenset(),
    *,
    importance_sha256: str | None = None,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> PruningPlan:
    """The lowest scores of what may go; see :func:`exporter.artifacts.plans.by_score.plan_drop`.

    Raises:
        PlanError: More is asked for than may go, or blocks that aren't scored.
    """
    refuse_unscored_blocks(report, counts.get("block", 0))
    left = _without(report, protected)
    refuse_too_many(left, counts, protected)
    return plan_drop(
        left,
        **counts,
        importance_sha256=importance_sha256,
        allow_all=allow_all,
        progress=progress,
    )


def _without(report: ImportanceReport, protected: Collection[SublayerRef]) -> ImportanceReport:
    """Without the scores of what must stay; a block stays when a sublayer of it does."""
    layers = {layer for layer, _ in protected}

    def may_go(score: Score) -> bool:
        if score.kind == "block":
            return score.layer not in layers
        return (score.layer, score.kind) not in protected

    return report.model_copy(update={"scores": [s for s in report.scores if may_go(s)]})


def scored_again(
    loaded: LoadedModel,
    report: ImportanceReport,
    text: CalibrationText,
    counts: Mapping[str, int],
    protected: Collection[SublayerRef] = (),
    *,
    every: int = 1,
    batch_size: int = 4,
    allow_all: bool = False,
    progress: Progress = QUIET,
) -> list[Option]:
    """Chooses iteratively, each kind on the model without what was chosen before.

    Args:
        loaded: The model.
        report: Says by which metric.
        text: What is scored on.
        counts: How many of each group.
        protected: What stays.
        every: So many are dropped between two scorings.
        batch_size: Samples in one forward pass.
        allow_all: Lets every sublayer go.
        progress: Told of every drop.

    Raises:
        PlanError: More is asked for than may go, or a score is not finite.
    """
    taken: list[Option] = []
    for group, number in groups_of(counts):
        start = cut_of_options(taken)
        options = options_for(group, report.model.num_layers, {*protected, *start})
        if number > len(options):
            refuse_number(group, number, len(options), report.model.source)
        with progress.task("iterative search"):
            taken += iterative(
                partial(
                    _rescored, loaded, text, report.metric, batch_size, group == "block", progress
                ),
                options,
                goal=number,
                num_layers=report.model.num_layers,
                every=every,
                start=start,
                allow_all=allow_all,
                progress=progress,
            )
    return taken


def _rescored(
    loaded: LoadedModel,
    text: CalibrationText,
    metric: str,
    batch_size: int,
    blocks: bool,
    progress: Progress,
    cut: BranchReplacements,
) -> list[Score]:
    with branches_replaced(loaded.model, cut):
        report = score_on(
            loaded, text, metrics=(metric,), batch_size=batch_size, blocks=blocks, progress=progress
        )
    return report.scores


Rescore = Callable[[BranchReplacements], Iterable[Score]]
"""Scores the model with a cut."""


def iterative(
    rescore: Rescore,
    options: Sequence[Option],
    *,
    goal: float,
    num_layers: int,
    every: int = 1,
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
    refuse_gain(options, goal, most_sublayers(num_layers, allow_all) - len(begun))
    taken: list[Option] = []
    scores: Mapping[tuple[SublayerRef, ...], float] = {}
    while not reaches(total_gain(taken), goal):
        if len(taken) % every == 0:
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
            code="score-missing",
        )
    return score
