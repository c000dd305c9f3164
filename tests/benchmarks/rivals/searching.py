"""Greedy choice with a number of each kind to go, as much work for whoever searches so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exporter.choose.selection.greedy import greedy
from exporter.choose.selection.meters import Meter
from exporter.choose.selection.options import (
    Group,
    Objective,
    Option,
    Step,
    objective_of,
    options_for,
)
from exporter.models.ablation.branch_replacements import NOTHING
from graph_passes.types import SublayerRef

SHORTLIST = 8


def greedy_numbers(
    meter: Meter, numbers: Mapping[Group, int], objective: Objective
) -> dict[Any, Any]:
    """Leaves out, one by one, what costs least, until so many of each kind are gone."""
    cut: dict[Any, Any] = {}
    left = dict(numbers)
    alone = dict(_alone(meter, list(_options(meter, left)), objective))
    while any(left.values()):
        steps = greedy(
            meter, list(_options(meter, left)), goal=sum(left.values()), objective=objective,
            start=cut, stop=_Quota(left), shortlist=SHORTLIST, prior=alone,
        )  # fmt: skip
        for step in steps:
            cut.update(dict.fromkeys(step.option.names, NOTHING))
            left[_kind(step)] -= 1
    return cut


def _options(meter: Meter, left: Mapping[Group, int]) -> Iterator[Option]:
    for kind, number in left.items():
        if number:
            yield from options_for(kind, meter.num_layers)


def _alone(
    meter: Meter, options: Sequence[Option], objective: Objective
) -> Iterator[tuple[SublayerRef, float]]:
    """What each sublayer costs when it alone goes, or its share of what its block costs."""
    damages = meter.measure_many({}, [option.cut for option in options])[1:]
    for option, damage in zip(options, damages, strict=True):
        for name in option.names:
            yield name, objective_of(damage, objective) / len(option.names)


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
