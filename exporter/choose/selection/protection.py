"""Sublayers that a search must leave alone."""

from __future__ import annotations

from collections.abc import Iterable

from exporter.artifacts.plans.by_score import parse_drops
from exporter.errors import UsageError
from graph_passes.types import BLOCK_KINDS, SublayerKind, SublayerRef

_ENDS = {"first": 0, "last": -1}


def protected_names(texts: Iterable[str], num_layers: int) -> frozenset[SublayerRef]:
    """Reads what is to stay.

    Args:
        texts: ``first``, ``last`` (both sublayers of that layer), or kinds with layers as
            ``depthcut prune`` takes them: ``attention:0,29``, ``mlp:3-5``, ``block:0``.
        num_layers: How many layers the model has.

    Raises:
        UsageError: When a text can't be read, or names a layer that is not there.
        PlanError: When one text names a sublayer twice.
    """
    found: set[SublayerRef] = set()
    for text in texts:
        found.update(_names(text.strip(), num_layers))
    return frozenset(found)


def _names(text: str, num_layers: int) -> Iterable[SublayerRef]:
    if text in _ENDS:
        layer = range(num_layers)[_ENDS[text]]
        return [SublayerRef(layer, kind) for kind in BLOCK_KINDS]
    found: list[SublayerRef] = []
    for deletion in parse_drops([text]).deletions:
        if deletion.layer >= num_layers:
            raise UsageError(
                f"{text!r} protects layer {deletion.layer}, but the model has only layers 0 to "
                f"{num_layers - 1}.",
                "Name layers of this model, or say first or last.",
            )
        found += [SublayerRef(deletion.layer, kind) for kind in _parts(deletion.kind, text)]
    return found


def _parts(kind: str, text: str) -> tuple[SublayerKind, ...]:
    if kind == "block":
        return BLOCK_KINDS
    parts = tuple(part for part in BLOCK_KINDS if part == kind)
    if not parts:
        raise UsageError(
            f"{text!r}: {kind} can't be protected by name.",
            "Protect attention, mlp or block.",
        )
    return parts
