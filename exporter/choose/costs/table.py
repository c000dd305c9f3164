"""costs.json: what a request takes, and what each sublayer's removal saves of it, as measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from exporter.artifacts import Artifact, Environment, LatencyRow, Record
from exporter.choose.costs.graph_sizes import GraphSizes
from exporter.choose.costs.request_shape import RequestShape
from exporter.errors import CostError
from graph_passes.types import BLOCK_KINDS, Replacement, SublayerKind, SublayerRef


class Member(Record):
    """A sublayer of a group; ``share`` is its work, as multiples of the group's average."""

    layer: int = Field(ge=0)
    kind: SublayerKind
    share: float = Field(default=1.0, gt=0)

    @property
    def name(self) -> SublayerRef:
        """Layer and kind."""
        return SublayerRef(self.layer, self.kind)


class Trial(Record):
    """A variant of the graph, and what it saved of the request.

    ``treated`` are the sublayers that were cut, ``saved_ms`` what a request then took less,
    ``std_error_ms`` the standard error of that. ``rows`` hold the raw times, the baseline's beside
    the variant's, a row for each of the request's cells.
    """

    replacement: Replacement
    treated: list[Member]
    saved_ms: float
    std_error_ms: float = Field(ge=0)
    rows: list[LatencyRow] = Field(default_factory=list)

    @property
    def work(self) -> float:
        """How many average sublayers were cut."""
        return sum(member.share for member in self.treated)

    @property
    def saved_ms_each(self) -> float:
        """Of an average sublayer."""
        return self.saved_ms / self.work


class CostGroup(Record):
    """Sublayers that cost the same, by their kind, shapes and window, and the trials of some."""

    signature: str
    members: list[Member] = Field(min_length=1)
    trials: list[Trial] = Field(default_factory=list)

    def each_ms(self, replacement: Replacement) -> tuple[float, float] | None:
        """What an average member saves, and the standard error; None where it wasn't measured.

        By the largest trial: its difference is the clearest.
        """
        trials = [trial for trial in self.trials if trial.replacement == replacement]
        trial = max(trials, key=lambda one: one.work, default=None)
        return None if trial is None else (trial.saved_ms_each, trial.std_error_ms / trial.work)


class CostTable(Artifact):
    """costs.json.

    ``at`` is the request, ``backend`` and ``provider`` what ran it. ``baseline_ms`` is
    what the request takes with the whole graph.
    """

    kind: Literal["cost_table"] = "cost_table"
    at: RequestShape
    backend: str
    provider: str
    environment: Environment
    baseline_ms: float = Field(gt=0)
    groups: list[CostGroup]

    @property
    def names(self) -> list[SublayerRef]:
        """Layer and kind of every sublayer whose cost is known."""
        known = (group for group in self.groups if group.trials)
        return [member.name for group in known for member in group.members]

    def saved_ms(self, name: SublayerRef, replacement: Replacement = "none") -> float:
        """Milliseconds of the request that one sublayer's removal saves.

        Below 0 where the replacement takes longer than what it replaces.
        """
        owners = ((group, member) for group in self.groups for member in group.members)
        for group, member in owners:
            if member.name == tuple(name) and (each := group.each_ms(replacement)) is not None:
                return member.share * each[0]
        raise CostError(
            f"The cost of {name[1]} {name[0]} with the replacement {replacement!r} was not "
            "measured.",
            "Measure the costs again with it: depthcut costs.",
            code="not-measured",
        )

    def speedup(self, choices: Mapping[Any, Replacement]) -> float | None:
        """How many times faster the request is foretold to be, as far as savings add up.

        None where costs don't tell it, or can't be right: nothing would be left of the request.
        """
        try:
            saved = math.fsum(self.saved_ms(name, how) for name, how in choices.items())
        except CostError:
            return None
        left = self.baseline_ms - saved
        return self.baseline_ms / left if left > 0 else None


_MOST_GROUPS = 4
"""Of one kind; more of them would take too long to measure one by one."""


@dataclass(frozen=True)
class Variant:
    """Which sublayers of a group are cut in one variant."""

    group: str
    replacement: Replacement
    members: tuple[Member, ...]

    @property
    def names(self) -> list[SublayerRef]:
        """Layers and kinds."""
        return [member.name for member in self.members]

    def __str__(self) -> str:
        layers = ", ".join(str(member.layer) for member in self.members)
        how = "" if self.replacement == "none" else f" ({self.replacement})"
        return f"{self.members[0].kind} {layers}{how}"


def groups_of(sizes: GraphSizes, names: Collection[SublayerRef] | None) -> list[CostGroup]:
    """The groups that sublayers belong to, by their first layers; None: all attentions and MLPs.

    Where one kind falls into many groups it is taken for a single one, in which each sublayer costs
    as much as its weights have bytes.
    """
    if names is None:
        names = [name for name in sizes.sublayers if name[1] in BLOCK_KINDS]
    wanted = {sizes[name].signature for name in names}
    kinds: dict[str, dict[str, list[SublayerRef]]] = {}
    for name, size in sorted(sizes.sublayers.items()):
        kinds.setdefault(name[1], {}).setdefault(size.signature, []).append(name)
    groups = []
    for kind, own in kinds.items():
        if len(own) > _MOST_GROUPS and wanted & own.keys():
            groups.append(
                _by_weight(kind, [name for sublayers in own.values() for name in sublayers], sizes)
            )
        else:
            groups += [_alike(key, sublayers) for key, sublayers in own.items() if key in wanted]
    return sorted(groups, key=lambda group: (group.members[0].layer, group.members[0].kind))


def _alike(signature: str, names: Iterable[SublayerRef]) -> CostGroup:
    members = [Member(layer=layer, kind=kind) for layer, kind in sorted(names)]
    return CostGroup(signature=signature, members=members)


def _by_weight(kind: str, names: Sequence[SublayerRef], sizes: GraphSizes) -> CostGroup:
    bytes_of = {name: sizes[name].weight_bytes for name in sorted(names)}
    if not all(bytes_of.values()):  # weights that are shared tell nothing
        return _alike(kind, names)
    mean = sum(bytes_of.values()) / len(bytes_of)
    members = [
        Member(layer=layer, kind=kind, share=size / mean)
        for (layer, kind), size in bytes_of.items()
    ]
    return CostGroup(signature=kind, members=members)


def variants(
    group: CostGroup, sizes: GraphSizes, replacements: Iterable[Replacement]
) -> list[Variant]:
    """The variants that show what a group's sublayers cost.

    About half of them are cut, evenly spread, once with each replacement; without any always.
    """

    def fits(member: Member, replacement: Replacement) -> bool:
        plain = replacement == "bias" or sizes[member.name].takes_linear
        return replacement == "none" or (sizes.hidden is not None and plain)

    result = []
    for replacement in dict.fromkeys(("none", *replacements)):
        fitting = [m for m in group.members if fits(m, replacement)]
        if fitting:
            step = len(fitting) / (count := max(1, len(fitting) // 2))
            chosen = tuple(fitting[int((n + 0.5) * step)] for n in range(count))
            result.append(Variant(group.signature, replacement, chosen))
    return result
