"""Plans as others write them: what a foreign ``config.json`` says is dropped. Needs no PyTorch.

A new dialect is one file, with ``KEYS`` by which it is known and ``read``, and one entry in
``_DIALECTS``. A config may speak several, as those of our own checkpoints do; they must then say
the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plans.dialects import block_configs, llm_drop, per_layer_config, section
from exporter.artifacts.plans.dialects.facts import TEXT_PARTS, layers_in, nested_configs
from exporter.errors import PlanError
from graph_passes.types import SublayerRef

_DIALECTS = {
    "depthcut": section,
    "LLM-Drop": llm_drop,
    "Puzzletron": block_configs,
    "transformers": per_layer_config,
}


def foreign_deletions(content: Any, where: str) -> list[PlannedDeletion] | None:
    """What a config drops; None where it says nothing of dropping in any dialect.

    Args:
        content: A ``config.json``, parsed; or a bare list of Puzzletron's blocks.
        where: The file's name, for errors.

    Raises:
        PlanError: It says something that can't be a plan, or two dialects in it disagree.
    """
    found = {name: deletions for name, deletions in _all_found(content, where).items() if deletions}
    if not found:
        return [] if _speaks(content) else None
    (first, deletions), *others = found.items()
    for name, other in others:
        if _places(other) != _places(deletions):
            raise PlanError(
                f"{where}: its entries for {first} and for {name} drop different sublayers.",
                "Remove one of the two from a copy of the file, and use the copy.",
                code="dialects-disagree",
            )
    return deletions


def with_drops(config: Mapping[str, Any], deletions: Sequence[PlannedDeletion]) -> dict[str, Any]:
    """A pruned checkpoint's ``config.json`` with its drops in LLM-Drop's and transformers' words.

    Where anything stands in a branch's place, neither can say so: then nothing is added. What the
    base's config said in those words, as LLM-Drop's own folders do, is gone in any case.
    """
    config = without_drops(config)
    if any(each.replacement != "none" for each in deletions):
        return config
    part = next((k for k in TEXT_PARTS if layers_in(config) is None and k in config), None)
    holder = config if part is None else config[part]
    skips = {per_layer_config.KEY: per_layer_config.write(holder, deletions)}
    said = {**holder, **llm_drop.write(deletions), **skips}
    return said if part is None else {**config, part: said}


def without_drops(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config without what it says of drops in others' words, its parts' included.

    For models of transformers' own classes, which leave nothing out for them: they tell what
    another program would leave out of the base. So does code that ``auto_map`` names.
    """
    gone = {*llm_drop.KEYS, *block_configs.KEYS, per_layer_config.KEY, "auto_map"}
    bare = {key: value for key, value in config.items() if key not in gone}
    own = config.get(per_layer_config.KEY)
    if own is not None and (kept := per_layer_config.without_skips(own)) is not None:
        bare[per_layer_config.KEY] = kept
    for part in TEXT_PARTS:
        if isinstance(bare.get(part), Mapping):
            bare[part] = without_drops(bare[part])
    return bare


def _all_found(content: Any, where: str) -> dict[str, list[PlannedDeletion]]:
    if isinstance(content, list):
        content = {"block_configs": content}
    found: dict[str, list[PlannedDeletion]] = {}
    for config in nested_configs(content):
        for name, dialect in _DIALECTS.items():
            if any(config.get(key) is not None for key in dialect.KEYS):
                deletions = dialect.read(config, where)
                _refuse_beyond(deletions, config, where)
                found[name] = [*found.get(name, []), *deletions]
    return found


def _speaks(content: Any) -> bool:
    """Whether a file is in a dialect at all; then it drops nothing."""
    if isinstance(content, list):
        return True
    keys = {key for dialect in _DIALECTS.values() for key in dialect.KEYS}
    return any(keys & config.keys() for config in nested_configs(content))


def _places(deletions: list[PlannedDeletion]) -> set[SublayerRef]:
    return {ref for each in deletions for ref in each.sublayers}


def _refuse_beyond(deletions: list[PlannedDeletion], config: Mapping[str, Any], where: str) -> None:
    layers = layers_in(config)
    for each in deletions if layers is not None else ():
        if each.layer >= (layers or 0):
            raise PlanError(
                f"{where}: it drops {each.kind} {each.layer}, but it also says that the model "
                f"has {layers} layers.",
                "Correct the layer's number; the first layer is 0.",
                code="layer-missing",
            )
