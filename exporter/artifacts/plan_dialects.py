"""Plans as others write them: what a foreign ``config.json`` says is dropped. Needs no PyTorch.

LLM-Drop (CASE-Lab-UMD/LLM-Drop, arXiv 2406.15786v6) has lists of layers in the order in which they
were dropped, or of one truth a layer. DeciLM and Puzzletron have ``block_configs``: one entry a
layer, with ``attention`` and ``ffn``. The third is what depthcut itself writes. A config that
speaks several must say the same in each.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.base import Layer, json_path
from exporter.errors import PlanError
from graph_passes.types import DeletionKind

SECTION = "depthcut"
"""Of a checkpoint whose layers lack sublayers; it says which modules stand in their places."""
ORIGIN = "depthcut_origin"
"""Of a checkpoint with fewer layers, which is a plain one; it says where they come from."""
_BLOCKS = "block_configs"
_LISTS: dict[str, DeletionKind] = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
_TEXT_PARTS = ("text_config", "language_config", "llm_config")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
_HINT = (
    "Read are drops of whole attentions and MLPs, with nothing in their places; of a healed "
    "checkpoint give the plan that it was made with."
)


def _numbers(value: Any) -> Any:
    """The layers of a list of one truth a layer; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(entry, bool) for entry in value):
        return [layer for layer, is_dropped in enumerate(value) if is_dropped]
    return value


class _Part(BaseModel):
    """A part of a config, which may say more."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Branch(_Part):
    """An attention or an MLP; what else a config says of it are its sizes."""

    no_op: bool | None = None
    replace_with_linear: Literal[False] | None = None  # its numbers would be elsewhere
    mamba: None = None


class _Block(_Part):
    attention: _Branch
    ffn: _Branch
    parallel_blocks: None = None


class _Bare(PlannedDeletion):
    replacement: Literal["none"] = "none"  # the numbers of others are not in a config


class _Own(_Part):
    deletions: list[_Bare]


_Listed = Annotated[list[Layer] | None, BeforeValidator(_numbers)]


class _Config(_Part):
    drop_attn_list: _Listed = None
    drop_mlp_list: _Listed = None
    block_configs: list[_Block] | None = None
    depthcut: _Own | None = None
    depthcut_origin: _Own | None = None


def foreign_deletions(content: Any, where: str) -> list[PlannedDeletion] | None:
    """What a parsed config, or a bare list of blocks, drops; None where it is in no dialect."""
    if isinstance(content, list):
        content = {_BLOCKS: content}
    read: list[tuple[str, list[PlannedDeletion]]] = []
    for part in nested_configs(content):
        try:
            read += _dialects(_Config.model_validate(part), part.get("layer_types"))
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{json_path(first['loc'])}: {first['msg']}, not {first['input']!r:.60}"
            raise PlanError(f"{where}: {problem}.", _HINT) from error
        except ValueError as error:
            raise PlanError(f"{where}: {error}.", _HINT) from error
    dropping = [(name, deletions) for name, deletions in read if deletions]
    places = [{ref for d in deletions for ref in d.sublayers} for _, deletions in dropping]
    if any(place != places[0] for place in places):
        names = " and for ".join(dict.fromkeys(name for name, _ in dropping))
        raise PlanError(
            f"{where}: its entries for {names} drop different sublayers.",
            "Remove one of the two from a copy of the file, and use the copy.",
        )
    return dropping[0][1] if dropping else ([] if read else None)


def _dialects(config: _Config, types: Any) -> Iterator[tuple[str, list[PlannedDeletion]]]:
    """What a config drops, with the dialect that says so."""
    lists = [(getattr(config, key), kind) for key, kind in _LISTS.items()]
    if own := config.depthcut or config.depthcut_origin:
        yield "depthcut", [PlannedDeletion(**dict(deletion)) for deletion in own.deletions]
    if any(layers is not None for layers, _ in lists):
        listed = [(layer, kind) for layers, kind in lists for layer in layers or ()]
        yield "LLM-Drop", [PlannedDeletion(layer=layer, kind=kind) for layer, kind in listed]
    if config.block_configs is not None:
        yield "Puzzletron", _of_blocks(config.block_configs, types)


def _of_blocks(blocks: Sequence[_Block], types: Any) -> list[PlannedDeletion]:
    """What is no operation there; what stays has to be as wide as others of its type."""
    is_typed = isinstance(types, list) and len(types) == len(blocks)
    dropped, kept = [], dict[tuple[str, str], dict[str, str]]()
    for layer, block in enumerate(blocks):
        kinds: tuple[tuple[DeletionKind, str], ...] = (("attention", "attention"), ("mlp", "ffn"))
        for kind, name in kinds:
            branch: _Branch = getattr(block, name)
            if branch.no_op:
                dropped.append(PlannedDeletion(layer=layer, kind=kind))
                continue
            sizes = {key: value for key, value in (branch.model_extra or {}).items() if value}
            alike = kept.setdefault((kind, str(types[layer]) if is_typed else ""), {})
            alike[f"$.{_BLOCKS}[{layer}].{name}"] = json.dumps(sizes, sort_keys=True)
    for alike in kept.values():
        usual = Counter(alike.values()).most_common(1)[0][0]
        for path, text in alike.items():
            if text != usual:
                raise ValueError(f"{path}: {text} differs from {usual} of its like")
    return dropped


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
