"""LLM-Drop's lists: ``drop_attn_list`` and ``drop_mlp_list``, of layers or of one truth a layer.

Source: CASE-Lab-UMD/LLM-Drop (arXiv 2406.15786v6). Its configs hold layers in the order in which
they were dropped; configs that its own classes save again hold one boolean for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plans.dialects.facts import layers_in, wanted, wrong
from graph_passes.types import DeletionKind

_KINDS: dict[str, DeletionKind] = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
KEYS = tuple(_KINDS)


def read(config: Mapping[str, Any], where: str) -> list[PlannedDeletion]:
    """Attentions first, then MLPs, each in the order of the list.

    Raises:
        PlanError: A list holds something else, or one truth too many or too few.
    """
    return [
        PlannedDeletion(layer=layer, kind=kind)
        for key, kind in _KINDS.items()
        for layer in _layers(config.get(key), layers_in(config), where, key)
    ]


def write(deletions: Sequence[PlannedDeletion]) -> dict[str, list[int]]:
    """The lists of a plan that replaces nothing, in the plan's order."""
    return {
        key: [each.layer for each in deletions if each.kind in (kind, "block")]
        for key, kind in _KINDS.items()
    }


def _layers(value: Any, layers: int | None, where: str, key: str) -> list[int]:
    given = wanted([] if value is None else value, list, where, key)
    truths = [isinstance(each, bool) for each in given]
    if given and all(truths):
        if layers is not None and len(given) != layers:
            raise wrong(where, key, f"{len(given)} truths for {layers} layers")
        return [layer for layer, dropped in enumerate(given) if dropped]
    for number, each in enumerate(given):
        wanted(each, int, where, f"{key}[{number}]")
        if each < 0:
            raise wrong(where, f"{key}[{number}]", f"there is no layer {each}")
    return list(given)
