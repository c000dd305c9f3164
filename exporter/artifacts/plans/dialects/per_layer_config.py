"""transformers' ``per_layer_config``: what each layer has otherwise, and what it skips.

Source: huggingface/transformers #45333 (the config, from 5.14) and #45332 (the models that honour
it, open as of 5.24). vLLM reads the same as a list with one entry a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plans.dialects.facts import layers_in, wanted, wrong
from graph_passes.types import MOST_LAYERS, DeletionKind, number_in, sublayer_kinds

KEY = "per_layer_config"
KEYS = (KEY,)
_SKIP = "skip"
_KINDS: dict[str, DeletionKind] = {"attention": "attention", "mlp": "mlp", "moe": "mlp"}
_Overrides = dict[int, dict[str, Any]]


def read(config: Mapping[str, Any], where: str) -> list[PlannedDeletion]:
    """What is skipped, by layer.

    Other attributes are taken for the model's own where all layers of a type have the same.

    Raises:
        PlanError: A layer skips what depthcut can't drop, or was given another width.
    """
    overrides = _overrides(config[KEY], where)
    _refuse_widths(overrides, config, where)
    return [
        PlannedDeletion(layer=layer, kind=kind)
        for layer in sorted(overrides)
        for kind in _skipped(overrides[layer].get(_SKIP, []), where, f"{KEY}.{layer}.{_SKIP}")
    ]


def write(config: Mapping[str, Any], deletions: Sequence[PlannedDeletion]) -> dict[str, Any]:
    """A config's entry with the skips of a plan that replaces nothing, beside what it holds."""
    overrides = _overrides(config.get(KEY) or {}, "config.json")
    for each in deletions:
        layer = overrides.setdefault(each.layer, {})
        layer[_SKIP] = sorted({*layer.get(_SKIP, []), *sublayer_kinds(each.kind)})
    return {str(layer): overrides[layer] for layer in sorted(overrides)}


def without_skips(entry: Any) -> dict[str, Any] | None:
    """A config's entry without what :func:`write` put there; None where nothing else is.

    One that was empty stays so: it says that no layer differs, where a family's own default is
    another.
    """
    overrides = _overrides(entry or {}, "config.json")
    kept = {
        str(layer): {key: value for key, value in each.items() if key != _SKIP}
        for layer, each in overrides.items()
    }
    found = {layer: each for layer, each in kept.items() if each}
    return found if found or not kept else None


def _overrides(entry: Any, where: str) -> _Overrides:
    pairs: Iterable[tuple[Any, Any]]
    pairs = enumerate(entry) if isinstance(entry, list) else wanted(entry, dict, where, KEY).items()
    found: _Overrides = {}
    for name, each in pairs:
        layer = number_in(str(name))
        if layer is None or layer >= MOST_LAYERS:
            raise wrong(where, f"{KEY}.{name:.60}", f"a layer below {MOST_LAYERS} is wanted")
        found[layer] = dict(wanted(each, dict, where, f"{KEY}.{name}"))
    return found


def _skipped(value: Any, where: str, path: str) -> list[DeletionKind]:
    kinds: list[DeletionKind] = []
    for name in wanted(value, list, where, path):
        if name not in _KINDS:
            known = ", ".join(_KINDS)
            raise wrong(where, path, f"{name!r} can't be dropped here", f"Known are {known}.")
        if _KINDS[name] not in kinds:
            kinds.append(_KINDS[name])
    return kinds


def _refuse_widths(overrides: _Overrides, config: Mapping[str, Any], where: str) -> None:
    """A plan drops whole sublayers; a layer that differs from its like was changed otherwise."""
    count = layers_in(config) or max(overrides, default=-1) + 1
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != count:
        types = ["all"] * count
    for layer, each in sorted(overrides.items()):
        own = {key: value for key, value in each.items() if key != _SKIP}
        like = [n for n in range(count) if layer < count and types[n] == types[layer]]
        for key, value in own.items():
            if value == config.get(key) or all(
                overrides.get(n, {}).get(key) == value for n in like
            ):
                continue
            raise wrong(
                where,
                f"{KEY}.{layer}.{key}",
                f"layer {layer} has {value!r} there, which others do not; depthcut drops whole "
                "sublayers and changes no width",
            )
