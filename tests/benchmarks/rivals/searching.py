"""Greedy choice with a number of each kind to go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.choose.selection.greedy import greedy
from exporter.choose.selection.meters import Meter
from exporter.choose.selection.options import Group, Objective, Step, options_for
from exporter.models.ablation.branch_replacements import NOTHING


def greedy_numbers(
    meter: Meter, numbers: Mapping[Group, int], objective: Objective, **more: Any
) -> dict[Any, Any]:
    """Leaves out, one by one, what costs least, until so many of each kind are gone.

    Args:
        meter: Measures damage.
        numbers: How many of each kind (``attention``, ``mlp``, or ``block`` alone).
        objective: Which damage counts.
        more: For :func:`exporter.choose.selection.greedy.greedy`.

    Returns:
        The cut.
    """
    cut: dict[Any, Any] = {}
    left = dict(numbers)
    while any(left.values()):
        options = [
            option
            for kind, number in left.items()
            if number
            for option in options_for(kind, meter.num_layers)
        ]
        steps = greedy(
            meter, options, goal=sum(left.values()), objective=objective, start=cut,
            stop=_Quota(left), **more,
        )  # fmt: skip
        for step in steps:
            cut.update(dict.fromkeys(step.option.names, NOTHING))
            left[_kind(step)] -= 1
    return cut


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
