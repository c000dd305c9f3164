"""The record, inside a pruned model, of what was cut out of it: ``depthcut.plan``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import onnx_ir as ir

from graph_passes.types import MOST_LAYERS, Replacement, SublayerKind, SublayerRef, number_in

PLAN_KEY = "depthcut.plan"
REPLACEMENTS_KEY = "depthcut.replacements"
RENUMBERING_KEY = "depthcut.kv_renumbering"

_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class RecordedReplacement:
    """What took a deleted sublayer's place."""

    kind: Replacement = "none"
    digest: str = ""
    folded_into: tuple[SublayerRef, ...] = ()


def recorded(model: ir.Model) -> frozenset[SublayerRef]:
    """The sublayers that were cut out of this model earlier; an unreadable record counts as none.

    The record only labels what is found, so a foreign or broken one must not stop the surgery.
    """
    return frozenset(recorded_replacements(model))


def recorded_replacements(model: ir.Model) -> dict[SublayerRef, RecordedReplacement]:
    """The same, with what came in the place of each; an unreadable detail counts as unknown."""
    details = _entry(model, REPLACEMENTS_KEY, {})
    replacements = {}
    try:
        for entry in _entry(model, PLAN_KEY, []):
            if entry["kind"] in get_args(SublayerKind):
                ref = _ref(f"{entry['kind']} {entry['layer']}")
                kind = entry.get("replacement", "none")
                known = cast(Replacement, kind if kind in get_args(Replacement) else "none")
                replacements[ref] = _with_details(known, ref, details)
    except _UNREADABLE:
        return {}
    return replacements


def _with_details(kind: Replacement, ref: SublayerRef, details: Any) -> RecordedReplacement:
    try:
        detail = details[str(ref)]
        homes = tuple(map(_ref, detail["folded_into"]))
        return RecordedReplacement(kind, str(detail["bias_sha256"]), homes)
    except _UNREADABLE:
        return RecordedReplacement(kind)


def _ref(text: str) -> SublayerRef:
    kind, digits = text.split()
    layer = number_in(digits)
    if layer is None or layer >= MOST_LAYERS:
        raise ValueError(f"{digits} is no layer")
    return SublayerRef(layer, cast(SublayerKind, kind))


def _entry(model: ir.Model, key: str, empty: Any) -> Any:
    try:
        return json.loads(model.metadata_props.get(key, "null")) or empty
    except _UNREADABLE:
        return empty


def record(model: ir.Model, cut: Mapping[SublayerRef, RecordedReplacement]) -> None:
    """Adds what was cut, and what came in its place, to the model's record."""
    whole = recorded_replacements(model) | dict(cut)
    entries = [
        {"kind": ref.kind, "layer": ref.layer, "replacement": whole[ref].kind}
        for ref in sorted(whole)
    ]
    details = {
        str(ref): {"bias_sha256": r.digest, "folded_into": [str(home) for home in r.folded_into]}
        for ref, r in whole.items()
        if r.kind != "none"
    }
    model.metadata_props[PLAN_KEY] = canonical_json(entries)
    if details:
        model.metadata_props[REPLACEMENTS_KEY] = canonical_json(details)


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
