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
    except (ValueError, TypeError, KeyError):
        return frozenset()


def record(model: ir.Model, cut: Iterable[SublayerRef]) -> None:
    """Adds ``cut`` to the model's record."""
    entries = [
        {"kind": ref.kind, "layer": ref.layer, "replacement": "none"}
        for ref in sorted(recorded(model) | set(cut))
    ]
    model.metadata_props[PLAN_KEY] = canonical_json(entries)


def canonical_json(value: object) -> str:
    """JSON without a choice: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
