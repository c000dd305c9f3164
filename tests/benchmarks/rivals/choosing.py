"""Rivals that only choose: ShortGPT, the cosine of LLM-Drop, SLEB and BlockPruner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.greedy import greedy
from exporter.choose.budgets.limits import Meter
from exporter.choose.budgets.options import Group, Option, Step, options_for
from exporter.models.ablation.branch_replacements import NOTHING, without_branches
from exporter.models.ablation.damage import Objective
from exporter.score.scoring import score_on
from graph_passes.types import SublayerRef
from tests.benchmarks.rivals.work import BATCH, Candidate, Workplace, span_distances


def shortgpt(work: Workplace, dropped: int) -> Candidate:
    """Drops the blocks of the lowest block influence."""
    influence = span_distances(work.model, work.few)
    lowest = np.argsort(influence, kind="stable")[:dropped]
    layers = [int(layer) for layer in lowest]
    return Candidate.without_blocks(work.model, layers, read=(len(work.few.input_ids),))


@lru_cache(maxsize=1)
def cosine_scores(work: Workplace) -> dict[tuple[int, str], float]:
    """Every attention's and MLP's score, by layer and kind; lower for what turns the stream less.

    Source: arXiv 2406.15786, equations 1 to 3; as ``depthcut score`` has it.
    """
    report = score_on(work.loaded, work.few, batch_size=BATCH)
    return {(s.layer, s.kind): s.score for s in report.scores if s.kind in ("attention", "mlp")}


def cosine(work: Workplace, dropped: int, kinds: tuple[str, ...]) -> Candidate:
    """Drops so many of each kind (attention drop; joint layer drop)."""
    scores = cosine_scores(work)
    names: list[tuple[int, str]] = []
    for kind in kinds:
        order = sorted((name for name in scores if name[1] == kind), key=lambda n: scores[n])
        names += order[:dropped]
    return Candidate(without_branches(names, work.model), read=(len(work.few.input_ids),))


SHORTLIST = 8


def greedily(
    work: Workplace, dropped: int, kinds: tuple[Group, ...], objective: Objective = "kl"
) -> Candidate:
    """Leaves out, one by one, what costs least, until so many of each kind are gone."""
    meter, cut = work.meter, dict[Any, Any]()
    left = dict.fromkeys(kinds, dropped)
    alone = dict(_alone(meter, _options(meter, left), objective))
    while any(left.values()):
        steps = greedy(
            meter, _options(meter, left), goal=sum(left.values()), objective=objective,
            start=cut, stop=_Quota(left), shortlist=SHORTLIST, prior=alone,
        )  # fmt: skip
        for step in steps:
            cut.update(dict.fromkeys(step.option.names, NOTHING))
            left[_kind(step)] -= 1
    return Candidate(cut, read=(work.searched,))


def _options(meter: Meter, left: Mapping[Group, int]) -> list[Option]:
    stacks = Stacks(meter.num_layers)
    return [item for kind, n in left.items() if n for item in options_for(kind, stacks)]


def _alone(
    meter: Meter, options: Sequence[Option], objective: Objective
) -> Iterator[tuple[SublayerRef, float]]:
    """What each sublayer costs when it alone goes, or its share of what its block costs."""
    damages = meter.measure_many({}, [option.cut for option in options])[1:]
    for option, damage in zip(options, damages, strict=True):
        for name in option.names:
            yield name, damage.objective(objective) / len(option.names)


class _Quota:
    """Ends a search at the first step for which a kind has no number left."""

    def __init__(self, numbers: Mapping[Group, int]) -> None:
        self._left = dict(numbers)

    def __call__(self, step: Step) -> bool:
        kind = _kind(step)
        self._left[kind] -= 1
        return self._left[kind] < 0


def _kind(step: Step) -> Group:
    return step.option.deletions()[0].kind
