"""The record, inside a pruned model, of what was cut out of it: ``depthcut.plan``.

Canonical JSON, so the same cut gives the same bytes. A model that is pruned again keeps its
original layer numbers, since the record says which sublayers are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import cast, get_args

import onnx_ir as ir

from graph_passes.types import SublayerKind, SublayerRef

PLAN_KEY = "depthcut.plan"
RENUMBERING_KEY = "depthcut.kv_renumbering"

_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def recorded(model: ir.Model) -> frozenset[SublayerRef]:
    """The sublayers that were cut out of this model earlier; an unreadable record counts as none.

    The record only labels what is found, so a foreign or broken one must not stop the surgery.
    """
    try:
        entries = json.loads(model.metadata_props.get(PLAN_KEY, "[]"))
        return frozenset(
            SublayerRef(int(entry["layer"]), cast(SublayerKind, entry["kind"]))
            for entry in entries
            if entry["kind"] in get_args(SublayerKind)
        )
    except _UNREADABLE:
        return frozenset()


def record(model: ir.Model, cut: Iterable[SublayerRef]) -> None:
    """Adds ``cut`` to the model's record."""
    entries = [
        {"kind": ref.kind, "layer": ref.layer, "replacement": "none"}
        for ref in sorted(recorded(model) | set(cut))
    ]
    model.metadata_props[PLAN_KEY] = canonical_json(entries)


def recorded_renumbering(model: ir.Model) -> dict[str, str]:
    """Original name to present name of the caches; an unreadable record counts as none."""
    try:
        names = json.loads(model.metadata_props.get(RENUMBERING_KEY, "{}"))
        return {str(original): str(present) for original, present in names.items()}
    except _UNREADABLE:
        return {}


def record_renumbering(model: ir.Model, names: dict[str, str]) -> None:
    """Sets the model's map from original to present names; an empty one is taken away."""
    if names:
        model.metadata_props[RENUMBERING_KEY] = canonical_json(names)
    else:
        model.metadata_props.pop(RENUMBERING_KEY, None)


def canonical_json(value: object) -> str:
    """JSON without a choice: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
