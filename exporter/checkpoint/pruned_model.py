"""A pruned or healed model in PyTorch: without the dropped modules, and as a checkpoint."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plan_dialects import ORIGIN, SECTION, without_drops
from exporter.errors import UnknownArchitectureError, UsageError, first_line, pass_on_memory_error
from exporter.files import make_readable, staged_directory
from exporter.models.ablation.branch_replacements import BranchReplacements, branches_replaced
from exporter.models.architectures import layer_modules
from exporter.models.loading.model_class import hub_off, quiet_transformers
from exporter.models.loading.model_files import save_checkpoint
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.models.model_folder import OF_IMAGES
from exporter.models.pruned_structure import structure_for
from exporter.models.residual_stream import probe_inputs
from graph_passes.files.locations import real
from graph_passes.files.reading import read_json
from graph_passes.types import BLOCK_KINDS, SublayerRef, number_in, sublayer_kinds

if TYPE_CHECKING:
    import torch

    from exporter.models.branch_modules import PrunedStructure

LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""Files of a model that go with whatever is made of it."""
CONFIG_CODE = "configuration_decilm.py"
"""The one file of code that a checkpoint may have: it comes from depthcut."""
_ENDINGS = {".safetensors", ".json", ".md", ".txt", ".model", ".jinja"}
_TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
_NARROW_TOLERANCE = 2e-2  # sums of half a dozen numbers, each rounded


def prune_model(
    loaded: LoadedModel, deletions: Sequence[PlannedDeletion], cut: BranchReplacements
) -> None:
    """Puts modules that do a cut's work into a model, in place; no hook is left.

    A dropped branch becomes one module: nothing, a bias, or one or two products. The norm before it
    goes too, where nothing else reads it. A dropped attention keeps no keys and values; the one
    that the length of the past is read from keeps one number a token.
    """
    import torch

    model: Any = loaded.model
    refuse_tokenless(model)
    inputs = probe_inputs(model)
    with branches_replaced(model, cut), torch.inference_mode():
        wanted = answer_to(model, inputs)
    structure = structure_for(loaded, deletions, cut, inputs)
    place_replacements(model, structure, cut)
    with torch.inference_mode():
        tensor = answer_to(model, inputs)
    require_same(loaded, tensor, wanted)


def place_replacements(model: Any, structure: PrunedStructure, cut: BranchReplacements) -> None:
    """Puts the modules that a structure tells into a model, with a cut's numbers in them."""
    from exporter.models.branch_modules import ReplacementModule, pruned_class, put_modules

    put_modules(model, structure)
    model.__class__ = pruned_class(type(model), structure)
    # A model that is read a layer at a time is nowhere, and runs on the CPU. A graph's numbers are
    # rounded to the model's dtype, too.
    device, dtype = "cpu" if model.device.type == "meta" else model.device, model.dtype
    for branch in structure.branches:
        module = model.get_submodule(branch.path)
        assert isinstance(module, ReplacementModule)
        own = cut[SublayerRef(branch.layer, branch.kind)]
        own = own.turned(lambda tensor: tensor.detach().to(device, dtype))
        module.fill(own.bias, own.weight)
    model.eval().requires_grad_(False)


def save_pruned(loaded: LoadedModel, folder: Path) -> None:
    """Writes a model that :func:`prune_model` changed, as a folder that is there whole or not."""
    refuse_checkpoint_folder(folder)
    with staged_directory(folder) as stage:
        save_pruned_into(loaded, stage)


def save_pruned_into(loaded: LoadedModel, stage: Path) -> None:
    """The same into a folder that the caller stages."""
    from exporter.models.branch_modules import note_drops, structure_of

    save_checkpoint(loaded, stage)
    for path in stage.glob("*.safetensors"):
        make_readable(path)
    structure = structure_of(loaded.model.config)
    if structure is not None:
        note_drops(stage, structure)  # The config was written anew behind the weights.


def refuse_checkpoint_folder(folder: Path, kept: Iterable[Path] = ()) -> None:
    """Keeps a checkpoint from taking the place of anything but an earlier one."""
    place = real(folder)
    for item in kept:
        if real(item).is_relative_to(place) or (item.is_dir() and place.is_relative_to(real(item))):
            raise UsageError(
                f"{folder} would be the checkpoint, so {item} can't be inside it.",
                "Give the checkpoint a folder of its own.",
                code="overwrites-input",
            )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config: Any = None
    with contextlib.suppress(OSError, ValueError):
        config = read_json(folder / "config.json")
    what = "is not a pruned checkpoint"
    if isinstance(config, dict) and {SECTION, ORIGIN} & config.keys():
        # A training leaves other files, and folders.
        names = (*LICENSE_FILES, CONFIG_CODE, *(f"*{ending}" for ending in _ENDINGS))
        more = sorted(
            path.name
            for path in folder.iterdir()
            if not path.is_file() or not any(map(path.match, names))
        )
        what = f"depthcut did not write {more[0]} in it" if more else ""
    if what:
        raise UsageError(
            f"{folder} exists, and {what}.",
            "Give a folder that doesn't exist: an existing checkpoint is replaced as a whole.",
            code="not-ours",
        )


def load_pruned(folder: Path, *, dtype: str = "float32", train: bool = False) -> LoadedModel:
    """Loads a pruned checkpoint, for evaluation or fine-tuning. Runs no code of the folder's.

    The model is transformers' own class and can be given to its ``Trainer`` or any loop;
    :func:`save_pruned`, or its own ``save_pretrained``, writes such a checkpoint again.
    """
    loaded = load_model(str(folder), dtype=dtype, pruned=True)
    if train:
        loaded.model.train().requires_grad_(True)
    return loaded


def refuse_tokenless(model: Any) -> None:
    """Refuses a model that reads neither text nor images, before work goes into it."""
    classifies_images = type(model).__name__.endswith(OF_IMAGES)
    if model.main_input_name != "input_ids" and not classifies_images:
        raise UnknownArchitectureError(
            f"{type(model).__name__} takes no tokens, so it can't be saved pruned.",
            "Export it without a checkpoint, and use the pruned ONNX file.",
            code="takes-no-tokens",
        )


def answer_to(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or what else a model answers first, in float64."""
    output = model(**inputs)
    answer: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return answer.double()


def require_same(
    loaded: LoadedModel,
    given: torch.Tensor,
    wanted: torch.Tensor,
    hint: str = "This family can be pruned as ONNX only: depthcut export.",
) -> None:
    """Holds a changed model's answer against what it should be."""
    name = str(loaded.model.dtype).removeprefix("torch.")
    scale = max(1.0, float(wanted.abs().max()))
    limit = _TOLERANCE.get(name, _NARROW_TOLERANCE) * scale
    error = float((given - wanted).abs().max()) if given.shape == wanted.shape else float("inf")
    if not error <= limit:
        raise UnknownArchitectureError(
            f"Without its dropped modules {loaded.ref.architecture} computes wrong results: "
            f"the error is {error:.1e}, more than {limit:.1e}.",
            hint,
            code="wrong-results",
        )


# Lists whose length may be that of the layers by chance.
_OTHER_LISTS = ("architectures", "mrope_section")
_OTHER_ENDS = ("_token_id", "_token_ids", "_tokens")
_PER_LAYER = "per_layer_config"
_CONVERSIONS = "_weight_conversions"  # transformers' own
_NUMBERED = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "dense_layers")
"""Lists of layers' numbers."""
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index")
"""Numbers of layers at the beginning."""
_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
HINT = "It is written with all its layers, some of them empty."


def kept_layers(deletions: Sequence[PlannedDeletion], layers: int) -> list[int] | None:
    """The layers that stay where a plan drops whole blocks and nothing else; else None."""
    gone: dict[int, set[str]] = {}
    for deletion in deletions:
        gone.setdefault(deletion.layer, set()).update(sublayer_kinds(deletion.kind))
    bare = all(deletion.replacement == "none" for deletion in deletions)
    whole = all(kinds == set(BLOCK_KINDS) for kinds in gone.values())
    return [layer for layer in range(layers) if layer not in gone] if bare and whole else None


def shallow_model(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    wanted: torch.Tensor,
) -> LoadedModel:
    """The model without whole layers, the others numbered anew; their weights are shared."""
    import torch

    model: Any = loaded.model
    modules = layer_modules(model)
    kept = kept_layers(deletions, len(modules))
    if not kept:
        raise UnknownArchitectureError("The plan drops no whole blocks, or all of them.", HINT)
    config = shallow_config_of(loaded, deletions, kept)
    try:
        made = _made(model, config, _weights(model, modules, kept))
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


def shallow_config_of(
    loaded: LoadedModel,
    deletions: Sequence[PlannedDeletion],
    kept: Sequence[int],
) -> Any:
    """The config of a model with fewer layers, which notes where they come from."""
    modules = layer_modules(loaded.model)
    if any(module.form == "post_norm" for module in modules):
        raise UnknownArchitectureError(
            f"A norm of {loaded.ref.architecture} follows each sum, and stays where a block goes.",
            HINT,
        )
    layers = len(modules)
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
        "deletions": [deletion.model_dump(mode="json") for deletion in deletions],
    }
    return type(config).from_dict(content)


def _weights(model: Any, items: Sequence[Any], kept: Sequence[int]) -> dict[str, torch.Tensor]:
    paths = {module: path for path, module in model.named_modules()}
    prefixes = {paths[item.layer].removesuffix(f".{item.number}") for item in items}
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
    with quiet_transformers(), hub_off():
        made, info = type(model).from_pretrained(
            None, config=config, state_dict=weights, dtype=model.dtype, output_loading_info=True
        )
    lost = [*info["missing_keys"], *info["unexpected_keys"]]
    if lost:
        raise UnknownArchitectureError(f"its weights have other names, such as {sorted(lost)[0]}")
    # The weights get the names in the files that the whole model's have, experts' above all.
    vars(made).pop(_CONVERSIONS, None)
    if _CONVERSIONS in vars(model):
        setattr(made, _CONVERSIONS, vars(model)[_CONVERSIONS])
    if model.can_generate():
        made.generation_config = model.generation_config
    made.eval().requires_grad_(False)
    return made


def refuse_other_settings(model: Any, made: Any, kept: Sequence[int]) -> None:
    """Refuses a model of fewer layers in which one is not what it was.

    A window or a rotary base that a layer has by its number does not show on a few tokens.
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
