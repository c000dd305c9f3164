"""A model with fewer layers, where a plan drops whole blocks: a plain one that loads anywhere."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plans.dialects import ORIGIN, without_drops
from exporter.checkpoint.pruned_model import answer_to, require_same
from exporter.errors import UnknownArchitectureError, first_line, pass_on_memory_error
from exporter.models.ablation.streams import forward_of, giving
from exporter.models.anatomy.architectures import layer_modules
from exporter.models.anatomy.residual_stream import hooked, probe_inputs
from exporter.models.loading.model_source import LoadedModel
from exporter.models.loading.transformers_calls import quiet_transformers
from graph_passes.types import BLOCK_KINDS, number_in, sublayer_kinds

if TYPE_CHECKING:
    import torch

# Lists whose length may be that of the layers by chance.
_OTHER_LISTS = ("architectures", "mrope_section")
_OTHER_ENDS = ("_token_id", "_token_ids", "_tokens")
_PER_LAYER = "per_layer_config"
_NUMBERED = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "dense_layers")
"""Lists of layers' numbers."""
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index")
"""Numbers of layers at the beginning."""
_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
HINT = "It is written with all its layers, some of them empty."


def kept_layers(deletions: Sequence[PlannedDeletion], layers: int) -> list[int] | None:
    """The layers that stay where a plan drops whole blocks and nothing else; else None."""
    gone: dict[int, set[str]] = {}
    for each in deletions:
        gone.setdefault(each.layer, set()).update(sublayer_kinds(each.kind))
    bare = all(each.replacement == "none" for each in deletions)
    whole = all(kinds == set(BLOCK_KINDS) for kinds in gone.values())
    return [layer for layer in range(layers) if layer not in gone] if bare and whole else None


def shallow_model(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    wanted: torch.Tensor,
    *,
    exits: bool = False,
) -> LoadedModel:
    """The model without whole layers, the others numbered anew; their weights are shared.

    Args:
        loaded: The whole model; not changed.
        deletions: Whole blocks.
        wanted: What the model answers to
            :func:`~exporter.models.anatomy.residual_stream.probe_inputs` without them.
        exits: Whether the norms of the dropped layers go, too, where they stand on the stream.

    Raises:
        UnknownArchitectureError: A config can't say so of this family, or the model that it makes
            is another.
    """
    import torch

    model: Any = loaded.model
    found = layer_modules(model)
    kept = kept_layers(deletions, len(found))
    if not kept:
        raise UnknownArchitectureError("The plan drops no whole blocks, or all of them.", HINT)
    config = shallow_config_of(loaded, deletions, kept, exits=exits)
    try:
        made = _made(model, config, _weights(model, found, kept))
    except Exception as error:
        pass_on_memory_error(error)
        raise UnknownArchitectureError(
            f"{loaded.ref.architecture} can't be made with {len(kept)} layers: "
            f"{first_line(error)}.",
            HINT,
        ) from error
    refuse_other_settings(model, made, kept)
    shallow = replace(
        loaded, model=made, ref=loaded.ref.model_copy(update={"num_layers": len(kept)})
    )
    with torch.inference_mode():
        require_same(shallow, answer_to(made, probe_inputs(made)), wanted, HINT)
    return shallow


def exit_answer(model: Any, first: int) -> torch.Tensor:
    """What a model answers to its probe if what its first layers give skips all others.

    Args:
        model: The whole model.
        first: How many layers stay.
    """
    import torch

    layers, given = layer_modules(model), list[Any]()

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        given.append(output)

    with torch.inference_mode(), contextlib.ExitStack() as stack:
        with hooked([layers[first - 1].layer.register_forward_hook(keep)]):
            model(**probe_inputs(model))
        for each in layers[first:]:
            stack.enter_context(forward_of(each.layer, giving(given[0])))
        return answer_to(model, probe_inputs(model))


def shallow_config_of(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    kept: Sequence[int],
    *,
    exits: bool = False,
) -> Any:
    """The config of a model with fewer layers, which notes where they come from.

    Args:
        loaded: The whole model.
        deletions: Whole blocks.
        kept: The layers that stay.
        exits: Whether norms on the stream go with their layers.

    Raises:
        UnknownArchitectureError: The family has a norm on the stream, which stays.
    """
    found = layer_modules(loaded.model)
    if not exits and any(each.form == "post_norm" for each in found):
        raise UnknownArchitectureError(
            f"A norm of {loaded.ref.architecture} follows each sum, and stays where a block goes.",
            HINT,
        )
    layers = len(found)
    config = loaded.model.config
    content = config.to_dict()
    if type(config).__module__.startswith("transformers."):  # not a model's own code
        content = without_drops(content)
    text = config.get_text_config()
    key = type(text).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if text is config:
        content = shallow_config(content, kept, layers, key)
    else:
        part = next(name for name in config.sub_configs if getattr(config, name) is text)
        content[part] = shallow_config(content[part], kept, layers, key)
    content[ORIGIN] = {
        "version": 1,
        "base_sha256": loaded.ref.sha256,
        "layers": list(kept),
        "deletions": [each.model_dump(mode="json") for each in deletions],
    }
    return type(config).from_dict(content)


def _weights(model: Any, found: Sequence[Any], kept: Sequence[int]) -> dict[str, torch.Tensor]:
    paths = {module: path for path, module in model.named_modules()}
    prefixes = {paths[each.layer].removesuffix(f".{each.number}") for each in found}
    if len(prefixes) != 1:
        raise UnknownArchitectureError("The layers do not stand in one list.", HINT)
    place = {layer: number for number, layer in enumerate(kept)}
    pattern = re.compile(re.escape(prefixes.pop()) + r"\.([0-9]{1,4})\.")
    weights = {}
    for name, tensor in model.state_dict().items():
        match = pattern.match(name)
        if match is None:
            weights[name] = tensor
        elif int(match[1]) in place:
            stem = name[: match.start(1)]
            weights[f"{stem}{place[int(match[1])]}{name[match.end(1) :]}"] = tensor
    return weights


def _made(model: Any, config: Any, weights: dict[str, torch.Tensor]) -> Any:
    with quiet_transformers():
        made, info = type(model).from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
        )
    lost = [*info["missing_keys"], *info["unexpected_keys"]]
    if lost:
        raise UnknownArchitectureError(f"its weights have other names, such as {sorted(lost)[0]}")
    _save_alike(made, model)
    if model.can_generate():
        made.generation_config = model.generation_config
    made.eval().requires_grad_(False)
    return made


def _save_alike(made: Any, model: Any) -> None:
    """The weights get the names in the files that the whole model's have, experts' above all."""
    name = "_weight_conversions"
    vars(made).pop(name, None)
    if name in vars(model):
        setattr(made, name, vars(model)[name])


def refuse_other_settings(model: Any, made: Any, kept: Sequence[int]) -> None:
    """Refuses a model of fewer layers in which one is not what it was.

    A window or a rotary base that a layer has by its number does not show on a few tokens.

    Raises:
        UnknownArchitectureError: With the layer.
    """
    before, after = layer_modules(model), layer_modules(made)
    for new, old in zip(after, (before[layer] for layer in kept), strict=True):
        if dict(_settings(new.layer)) != dict(_settings(old.layer)):
            raise UnknownArchitectureError(
                f"Layer {old.number} is another as layer {new.number} of a model with "
                f"{len(kept)} layers.",
                HINT,
            )


def _settings(layer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain values that a layer's modules hold, but for their numbers."""
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str) or value is None
            if plain and not name.startswith("_") and name not in _NUMBER_NAMES:
                yield f"{path}.{name}", value


def shallow_config(
    config: Mapping[str, Any], kept: Sequence[int], layers: int, layers_key: str
) -> dict[str, Any]:
    """The config of the same model with some of its layers, numbered anew.

    So is every list in it that has an entry a layer. What a config says by a rule instead of a
    list, such as "every fourth layer", can't be said of other layers; :func:`shallow_model` looks
    whether each layer came out as it was.

    Args:
        config: As JSON: the part that has ``layers_key``.
        kept: The layers that stay, in order.
        layers: How many there are.
        layers_key: What the config calls that number.
    """
    shallow = {
        key: [value[layer] for layer in kept] if _has_entry_a_layer(key, value, layers) else value
        for key, value in config.items()
    }
    place = {layer: number for number, layer in enumerate(kept)}
    for key in _NUMBERED:
        if isinstance(config.get(key), list):
            shallow[key] = [place[layer] for layer in config[key] if layer in place]
    for key in _FIRST_LAYERS:
        first = config.get(key)
        if isinstance(first, int) and not isinstance(first, bool):
            shallow[key] = sum(layer < first for layer in kept)
    if isinstance(config.get(_PER_LAYER), Mapping):
        own = {number_in(str(layer)): sizes for layer, sizes in config[_PER_LAYER].items()}
        shallow[_PER_LAYER] = {str(place[n]): own[n] for n in kept if n in own}
    return {**shallow, layers_key: len(kept)}


def _has_entry_a_layer(key: str, value: Any, layers: int) -> bool:
    if not isinstance(value, list) or len(value) != layers or key in _NUMBERED:
        return False
    return key not in _OTHER_LISTS and not key.endswith(_OTHER_ENDS)
