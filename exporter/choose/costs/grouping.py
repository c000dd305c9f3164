"""Which sublayers cost the same, and which of them are cut to find out how much."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from exporter.choose.costs.graph_sizes import GraphSizes
from exporter.choose.costs.table import CostGroup, Member
from graph_passes.types import Replacement, SublayerRef

_MOST_GROUPS = 4
"""Of one kind; more of them would take too long to measure one by one."""
_SEVERAL = 4
"""With so many cut sublayers it is worth while to cut half of them too, and see how that adds."""


@dataclass(frozen=True)
class Variant:
    """Which sublayers of a group are cut in one variant.

    Attributes:
        group: Its signature.
        replacement: What takes their place.
        members: They.
    """

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


def groups_of(sizes: GraphSizes, names: Collection[SublayerRef]) -> list[CostGroup]:
    """The groups that named sublayers belong to, in the order of their first layers.

    Where one kind falls into many groups it is taken for a single one, in which each sublayer costs
    as much as its weights have bytes.

    Args:
        sizes: The graph's.
        names: Whose costs are wanted; the others of their groups come along.

    Raises:
        CostError: The graph has no such sublayer.
    """
    wanted = {sizes[name].signature for name in names}
    kinds: dict[str, dict[str, list[SublayerRef]]] = {}
    for name, size in sorted(sizes.sublayers.items()):
        kinds.setdefault(name[1], {}).setdefault(size.signature, []).append(name)
    found = []
    for kind, own in kinds.items():
        if len(own) > _MOST_GROUPS and wanted & own.keys():
            found.append(_by_weight(kind, [name for each in own.values() for name in each], sizes))
        else:
            found += [_alike(key, each) for key, each in own.items() if key in wanted]
    return sorted(found, key=lambda group: (group.members[0].layer, group.members[0].kind))


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

    About half of them are cut, evenly spread, once with each replacement. Without a replacement,
    which is always among them, half of that number is cut too.

    Args:
        group: The group.
        sizes: The graph's, which tell what can be replaced.
        replacements: What may take a sublayer's place.
    """
    found = []
    for replacement in dict.fromkeys(("none", *replacements)):
        fitting = [m for m in group.members if _fits(sizes, m, replacement)]
        if fitting:
            chosen = _spread(fitting, max(1, len(fitting) // 2))
            found.append(Variant(group.signature, replacement, chosen))
    half = len(found[0].members)
    if half >= _SEVERAL:
        found.append(Variant(group.signature, "none", _spread(group.members, half // 2)))
    return found


def _fits(sizes: GraphSizes, member: Member, replacement: str) -> bool:
    if replacement == "none":
        return True
    known = sizes.hidden is not None
    return known and (replacement == "bias" or sizes[member.name].takes_linear)


def _spread(members: Sequence[Member], count: int) -> tuple[Member, ...]:
    """So many of them, at even distances."""
    step = len(members) / count
    return tuple(members[int((n + 0.5) * step)] for n in range(count))
