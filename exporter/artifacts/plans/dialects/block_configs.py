"""Puzzletron's and DeciLM's ``block_configs``: one entry a layer, with its attention and its FFN.

Three spellings are read: DeciLM's (``attention``, ``ffn`` with ``n_heads_in_group``, ``ffn_mult``),
the same with plain sizes, and ``subblock_configs`` with a ``kind`` each, as ModelOpt writes now.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plans.dialects.facts import layers_in, wanted, wrong
from graph_passes.types import DeletionKind

KEY = "block_configs"
KEYS = (KEY,)
_NO_OP, _LINEAR = "no_op", "replace_with_linear"
_KINDS: dict[str, DeletionKind] = {
    "attention": "attention", "mla": "attention", "ffn": "mlp", "mlp": "mlp", "moe": "mlp",
}  # fmt: skip
_WIDTHS = {
    "intermediate_size": "intermediate_size", "num_key_value_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads", "num_query_heads": "num_attention_heads",
}  # fmt: skip
"""A sublayer's widths, and where a config has them for all layers."""
_NAMES = (_NO_OP, _LINEAR, "name", "kind")
_HINT = "Prune whole sublayers with depthcut, or keep that model with the tool that made it."


@dataclass(frozen=True)
class _Part:
    """One sublayer's entry, and its place in the file."""

    layer: int
    kind: DeletionKind
    entry: Mapping[str, Any]
    path: str

    @property
    def dropped(self) -> bool:
        return self.entry.get(_NO_OP) is True


def read(config: Mapping[str, Any], where: str) -> list[PlannedDeletion]:
    """Every sublayer that is a no-op, by layer.

    Raises:
        PlanError: A sublayer was replaced, narrowed or is of a kind that depthcut can't drop.
    """
    blocks = wanted(config[KEY], list, where, KEY)
    layers = layers_in(config)
    if layers is not None and len(blocks) != layers:
        raise wrong(where, KEY, f"{len(blocks)} entries for {layers} layers")
    parts = [part for n, block in enumerate(blocks) for part in _parts(n, block, where)]
    for part in parts:
        _refuse_replaced(part, where)
    _refuse_changed([part for part in parts if not part.dropped], config, where)
    return [PlannedDeletion(layer=p.layer, kind=p.kind) for p in parts if p.dropped]


def _parts(layer: int, block: Any, where: str) -> Iterator[_Part]:
    path = f"{KEY}[{layer}]"
    block = wanted(block, dict, where, path)
    if block.get("parallel_blocks"):
        raise wrong(
            where, f"{path}.parallel_blocks", f"layer {layer} has blocks side by side", _HINT
        )
    entries = {f"{path}.{name}": (name, block[name]) for name in ("attention", "ffn", "mlp")
               if block.get(name) is not None}  # fmt: skip
    for number, each in enumerate(block.get("subblock_configs") or ()):
        place = f"{path}.subblock_configs[{number}]"
        entries[place] = wanted(each, dict, where, place).get("kind"), each
    if not entries:
        raise wrong(where, path, "it has neither attention and ffn nor subblock_configs", _HINT)
    for place, (kind, entry) in entries.items():
        entry = wanted(entry, dict, where, place)
        if kind not in _KINDS or entry.get("mamba"):
            told = f"layer {layer} has a {kind}, which is neither attention nor MLP"
            raise wrong(where, place, told, _HINT)
        yield _Part(layer, _KINDS[kind], entry, place)


def _refuse_replaced(part: _Part, where: str) -> None:
    for name in (_NO_OP, _LINEAR):
        wanted(part.entry.get(name) or False, bool, where, f"{part.path}.{name}")
    if part.entry.get(_LINEAR):
        raise wrong(
            where,
            f"{part.path}.{_LINEAR}",
            f"the {part.kind} of layer {part.layer} is replaced by a linear map, whose numbers "
            "are not in this file",
            "Make it a no-op in a copy of the file, and fit a map of your own: depthcut heal.",
        )


def _refuse_changed(kept: list[_Part], config: Mapping[str, Any], where: str) -> None:
    """Layers of one type are alike in a model that was not narrowed, and as the config says."""
    types = config.get("layer_types")
    groups: dict[tuple[str, str], list[_Part]] = {}
    for part in kept:
        known = isinstance(types, list) and part.layer < len(types)
        of_type = str(types[part.layer]) if known and types else ""
        groups.setdefault((part.kind, of_type), []).append(part)
    for group in groups.values():
        usual = json.loads(Counter(_text(part) for part in group).most_common(1)[0][0])
        told = {n: config[top] for n, top in _WIDTHS.items() if n in usual and config.get(top)}
        for part in group:
            own = json.loads(_text(part))
            for name in sorted(own.keys() | usual.keys()):
                _refuse_other(part, name, own.get(name), {**usual, **told}.get(name), where)


def _refuse_other(part: _Part, name: str, value: Any, usual: Any, where: str) -> None:
    if value != usual:
        raise wrong(
            where,
            f"{part.path}.{name}",
            f"the {part.kind} of layer {part.layer} has {value!r} there instead of {usual!r}; "
            "depthcut drops whole sublayers and changes no widths",
            _HINT,
        )


def _text(part: _Part) -> str:
    """What an entry says but for its name, in one order."""
    told = {key: value for key, value in part.entry.items() if key not in _NAMES and value}
    return json.dumps(told, sort_keys=True)
