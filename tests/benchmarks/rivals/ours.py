"""depthcut's own: chosen greedily by KL divergence, and healed as ``depthcut heal`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from exporter.artifacts import HealKind, PlannedDeletion, PruningPlan
from exporter.choose.selection.options import Group
from exporter.heal.healed import heal
from exporter.heal.options import HealOptions
from tests.benchmarks.rivals.candidate import Candidate, new_values
from tests.benchmarks.rivals.searching import greedy_numbers
from tests.benchmarks.rivals.workplace import Workplace

Numbers = Callable[[int], Mapping[Group, int]]
"""From a row's number to how many of each kind go."""


def both_kinds(dropped: int) -> Mapping[Group, int]:
    """As many attentions and MLPs as so many blocks have, each wherever it costs least."""
    return {"attention": dropped, "mlp": dropped}


def whole_blocks(dropped: int) -> Mapping[Group, int]:
    """Whole blocks."""
    return {"block": dropped}


def attentions(dropped: int) -> Mapping[Group, int]:
    """Attentions alone."""
    return {"attention": dropped}


def chosen(work: Workplace, numbers: Mapping[Group, int]) -> Candidate:
    """Drops so many of each kind greedily by the KL divergence of the answers."""
    return Candidate(greedy_numbers(work.meter, numbers, "kl"))


def healed(work: Workplace, numbers: Mapping[Group, int], kind: HealKind) -> Candidate:
    """The same choice, healed on the text that all methods have."""
    names = chosen(work, numbers).cut
    plan = PruningPlan(
        deletions=[PlannedDeletion(layer=layer, kind=part) for layer, part in sorted(names)]
    )
    found = heal(
        work.loaded, plan, _options(work, kind), work=work.keep / "healing",
        progress=work.progress,
    )  # fmt: skip
    return Candidate(found.branch_replacements, weights=new_values(work.model, found.weights))


def can_heal(kind: str) -> bool:
    """Whether this depthcut knows a kind of healing."""
    return kind in get_args(HealKind)


def _options(work: Workplace, kind: HealKind) -> HealOptions:
    about: dict[str, Any] = {"samples": len(work.text.input_ids)}
    if kind == "distill":
        about = {"tokens": work.distill_tokens}
    length = work.text.ref.sequence_length
    return HealOptions(kind=kind, calibration=(work.source,), sequence_length=length, **about)
