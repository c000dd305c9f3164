"""Plans as others write them: what a foreign ``config.json`` says is dropped. Needs no PyTorch.

LLM-Drop (CASE-Lab-UMD/LLM-Drop, arXiv 2406.15786v6) has lists of layers in the order in which they
were dropped, or of one truth a layer. Puzzletron and DeciLM have ``block_configs``: one entry a
layer, with ``attention`` and ``ffn``, or ``subblock_configs`` with a ``kind`` each. The third is
what depthcut itself writes. A config that speaks several must say the same in each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.base import json_path
from exporter.errors import PlanError
from graph_passes.types import DeletionKind

SECTION = "depthcut"
"""Of a checkpoint whose layers lack sublayers; it says which modules stand in their places."""
ORIGIN = "depthcut_origin"
"""Of a checkpoint with fewer layers, which is a plain one; it says where they come from."""
_BLOCKS, _LINEAR = "block_configs", "replace_with_linear"
_LISTS: dict[str, DeletionKind] = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
_SUBBLOCKS: dict[str, DeletionKind] = {
    "attention": "attention", "mla": "attention", "ffn": "mlp", "mlp": "mlp", "moe": "mlp",
}  # fmt: skip
_TEXT_PARTS = ("text_config", "language_config", "llm_config")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_WORDS = {int: "a number", dict: "an object", list: "a list", bool: "true or false"}
_HINT = "Prune whole sublayers with depthcut, or keep that model with the tool that made it."


def foreign_deletions(content: Any, where: str) -> list[PlannedDeletion] | None:
    """What a parsed config, or a bare list of blocks, drops; None where it is in no dialect."""
    if isinstance(content, list):
        content = {_BLOCKS: content}
    readers = {"depthcut": _own, "LLM-Drop": _lists, "Puzzletron": _blocks}
    read = [
        (name, deletions)
        for config in nested_configs(content)
        for name, reader in readers.items()
        if (deletions := reader(config, where)) is not None
    ]
    dropping = [(name, deletions) for name, deletions in read if deletions]
    if not dropping:
        return [] if read else None
    first, deletions = dropping[0]
    for name, others in dropping[1:]:
        if _places(others) != _places(deletions):
            raise PlanError(
                f"{where}: its entries for {first} and for {name} drop different sublayers.",
                "Remove one of the two from a copy of the file, and use the copy.",
                code="dialects-disagree",
            )
    return deletions


def with_drops(config: Mapping[str, Any], deletions: Sequence[PlannedDeletion]) -> dict[str, Any]:
    """A pruned checkpoint's ``config.json`` with its drops in LLM-Drop's words.

    Where anything stands in a branch's place, they can't say so: then nothing is added. What the
    base's config said in others' words, as LLM-Drop's own folders do, is gone in any case.
    """
    config = without_drops(config)
    if any(deletion.replacement != "none" for deletion in deletions):
        return config
    lists = {
        key: [deletion.layer for deletion in deletions if deletion.kind in (kind, "block")]
        for key, kind in _LISTS.items()
    }
    part = next((k for k in _TEXT_PARTS if layers_in(config) is None and k in config), None)
    return {**config, **lists} if part is None else {**config, part: {**config[part], **lists}}


def without_drops(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without what it says of drops in others' words, its parts' included.

    For models of transformers' own classes, which leave nothing out for them: they tell what
    another program would leave out of the base. So does code that ``auto_map`` names.
    """
    gone = {*_LISTS, _BLOCKS, "auto_map"}
    bare = {key: value for key, value in config.items() if key not in gone}
    for part in _TEXT_PARTS:
        if isinstance(bare.get(part), Mapping):
            bare[part] = without_drops(bare[part])
    return bare


def nested_configs(content: Any) -> Iterator[Mapping[str, Any]]:
    """A config, and the one of the language model in it where it has others too."""
    if isinstance(content, Mapping):
        yield content
        yield from (content[key] for key in _TEXT_PARTS if isinstance(content.get(key), Mapping))


def layers_in(config: Mapping[str, Any]) -> int | None:
    """How many layers a config says that there are."""
    numbers = (config.get(key) for key in _LAYER_KEYS)
    return next((n for n in numbers if isinstance(n, int) and not isinstance(n, bool)), None)


def _places(deletions: Sequence[PlannedDeletion]) -> set[Any]:
    return {ref for deletion in deletions for ref in deletion.sublayers}


def _wrong(where: str, path: str, problem: str, hint: str = "") -> PlanError:
    return PlanError(f"{where}: $.{path}: {problem}.", hint)


def _wanted(value: Any, kind: type, where: str, path: str) -> Any:
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise _wrong(where, path, f"{_WORDS[kind]} is wanted, not {value!r:.60}")


def _layer(layer: int, config: Mapping[str, Any], where: str, path: str) -> int:
    layers = layers_in(config)
    if layer < 0 or (layers is not None and layer >= layers):
        raise PlanError(
            f"{where}: $.{path}: there is no layer {layer} of {layers or 'any model'}.",
            "Correct the layer's number; the first layer is 0.",
            code="layer-missing",
        )
    return layer


def _own(config: Mapping[str, Any], where: str) -> list[PlannedDeletion] | None:
    name = next((name for name in (SECTION, ORIGIN) if config.get(name) is not None), None)
    if name is None:
        return None
    path = f"{name}.deletions"
    listed = _wanted(_wanted(config[name], dict, where, name).get("deletions"), list, where, path)
    deletions = []
    for number, entry in enumerate(listed):
        try:
            deletion = PlannedDeletion.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            place = json_path((name, "deletions", number, *first["loc"]))
            raise PlanError(f"{where}: {place}: {first['msg']}.") from error
        if deletion.replacement != "none":
            raise _wrong(
                where,
                path,
                f"{deletion.kind} {deletion.layer} is replaced ({deletion.replacement}), and the "
                "numbers of that are not in this file",
                "Give the healed plan that the checkpoint was made with.",
            )
        deletions.append(deletion)
    return deletions


def _lists(config: Mapping[str, Any], where: str) -> list[PlannedDeletion] | None:
    if all(config.get(key) is None for key in _LISTS):
        return None
    return [
        PlannedDeletion(layer=layer, kind=kind)
        for key, kind in _LISTS.items()
        for layer in _listed(config, key, where)
    ]


def _listed(config: Mapping[str, Any], key: str, where: str) -> list[int]:
    value, layers = config.get(key), layers_in(config)
    entries = _wanted([] if value is None else value, list, where, key)
    if entries and all(isinstance(entry, bool) for entry in entries):
        if layers is not None and len(entries) != layers:
            raise _wrong(where, key, f"{len(entries)} truths for {layers} layers")
        return [layer for layer, is_dropped in enumerate(entries) if is_dropped]
    places = [f"{key}[{number}]" for number in range(len(entries))]
    return [
        _layer(_wanted(entry, int, where, place), config, where, place)
        for place, entry in zip(places, entries, strict=True)
    ]


def _blocks(config: Mapping[str, Any], where: str) -> list[PlannedDeletion] | None:
    if config.get(_BLOCKS) is None:
        return None
    blocks, layers = _wanted(config[_BLOCKS], list, where, _BLOCKS), layers_in(config)
    if layers is not None and len(blocks) != layers:
        raise _wrong(where, _BLOCKS, f"{len(blocks)} entries for {layers} layers")
    types = config.get("layer_types")
    is_typed = isinstance(types, list) and len(types) == len(blocks)
    dropped, kept = [], dict[tuple[str, str], list[tuple[str, str]]]()
    for layer, block in enumerate(blocks):
        for path, kind, entry in _subblocks(block, where, f"{_BLOCKS}[{layer}]"):
            if _is_dropped(entry, where, path):
                dropped.append(PlannedDeletion(layer=layer, kind=kind))
                continue
            own = {k: v for k, v in entry.items() if v and k not in ("name", "kind")}
            like = kind, str(types[layer]) if is_typed and types else ""
            kept.setdefault(like, []).append((path, json.dumps(own, sort_keys=True)))
    for group in kept.values():
        usual = Counter(sizes for _, sizes in group).most_common(1)[0][0]
        for path, sizes in group:
            if sizes != usual:
                problem = f"{sizes} differs from {usual} of its like; depthcut changes no widths"
                raise _wrong(where, path, problem, _HINT)
    return dropped


def _subblocks(
    block: Any, where: str, path: str
) -> Iterator[tuple[str, DeletionKind, Mapping[str, Any]]]:
    block = _wanted(block, dict, where, path)
    entries = [(f"{path}.{name}", name, block[name]) for name in ("attention", "ffn", "mlp")
               if block.get(name) is not None]  # fmt: skip
    for number, entry in enumerate(block.get("subblock_configs") or ()):
        place = f"{path}.subblock_configs[{number}]"
        entries.append((place, _wanted(entry, dict, where, place).get("kind"), entry))
    if not entries or block.get("parallel_blocks"):
        raise _wrong(where, path, "neither one attention and one ffn nor subblock_configs", _HINT)
    for place, name, entry in entries:
        if name not in _SUBBLOCKS or _wanted(entry, dict, where, place).get("mamba"):
            raise _wrong(where, place, f"{name} is neither attention nor MLP", _HINT)
        yield place, _SUBBLOCKS[name], entry


def _is_dropped(entry: Mapping[str, Any], where: str, path: str) -> bool:
    if _wanted(entry.get(_LINEAR) or False, bool, where, f"{path}.{_LINEAR}"):
        raise _wrong(
            where,
            f"{path}.{_LINEAR}",
            "a linear map stands there, whose numbers are not in this file",
            "Make it a no-op in a copy of the file, and fit a map of your own: depthcut heal.",
        )
    return bool(_wanted(entry.get("no_op") or False, bool, where, f"{path}.no_op"))
