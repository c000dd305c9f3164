"""Finds a model's layers and sublayers, by the table of families or by their usual names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exporter.artifacts.stacks import Deleted, Stacks
from exporter.errors import UnknownArchitectureError
from exporter.models.families import FAMILIES, STACKS, Family
from exporter.models.residual_stream import LayerModules, ProbeVerdict, ResidualForm, probe
from graph_passes.types import SublayerKind, SublayerRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SublayerModules:
    """One sublayer."""

    layer: int  # the layer's number from 0
    kind: SublayerKind
    contribution: torch.nn.Module
    multiplier: float
    reads: torch.nn.Module
    reads_sources: bool = False

    @property
    def ref(self) -> SublayerRef:
        """Which sublayer it is."""
        return SublayerRef(self.layer, self.kind)


def layer_modules(model: Any) -> list[LayerModules]:
    """Finds the modules of every layer.

    A model type that is not in the table is held against every row; a row is taken only when a
    small forward pass shows that the branches which it names add up to the residual stream.
    """
    model_type = model.config.model_type
    if model_type in STACKS and model.config.is_encoder_decoder:
        raise UnknownArchitectureError(
            f"{type(model).__name__} is an encoder-decoder, and this takes one stack of layers.",
            "score, plan, export and compare take encoder-decoders.",
            code="two-stacks",
        )
    if model_type in FAMILIES:
        modules = _resolve(model, FAMILIES[model_type])
        if modules is None:
            raise layers_elsewhere(model_type)
        return modules
    return _discover(model)


def stacked_layers(model: Any) -> list[LayerModules]:
    """The modules of every layer of an encoder-decoder, the encoder's first, numbered through."""
    rows = STACKS.get(model.config.model_type)
    if rows is None:
        raise unknown_layers(model)
    depths = Stacks.of(model.config)
    modules: list[LayerModules] = []
    for row, depth in zip(rows, (depths.encoder, depths.decoder), strict=True):
        layers = _resolve(model, row, depth, first=len(modules))
        if layers is None:
            raise layers_elsewhere(model.config.model_type)
        modules += layers
    return modules


def every_sublayer(model: Any) -> list[SublayerModules]:
    """As :func:`sublayers`, also of an encoder-decoder: both stacks, cross-attentions too."""
    if not model.config.is_encoder_decoder:
        return sublayers(model)
    encoder = Stacks.of(model.config).encoder
    modules = sublayers_of(stacked_layers(model))
    return [replace(part, reads_sources=part.layer < encoder) for part in modules]


def sublayers(model: Any) -> list[SublayerModules]:
    """The attention and the MLP of every layer, in the layers' order."""
    return sublayers_of(layer_modules(model))


def sublayers_of(layers: Iterable[LayerModules]) -> list[SublayerModules]:
    """The attention and the MLP of given layers, and a cross-attention between, in their order."""
    result = []
    for modules in layers:
        number, multiplier = modules.number, modules.multiplier
        attention, mlp, cross = modules.attention, modules.mlp, modules.cross_attention
        reads = modules.attention_reads or attention, modules.mlp_reads or mlp
        result.append(SublayerModules(number, "attention", attention, multiplier, reads[0]))
        if cross is not None:
            result.append(SublayerModules(number, "cross_attention", cross, multiplier, cross))
        result.append(SublayerModules(number, "mlp", mlp, multiplier, reads[1]))
    return result


def named_in(model: Any, deletions: Iterable[Deleted]) -> list[SublayerRef]:
    """The sublayers of a model that deletions name, in the layers' order."""
    if model.config.is_encoder_decoder:
        return Stacks.of(model.config).every(deletions)
    return Stacks(len(layer_modules(model))).every(deletions)


def candidate_layers(model: Any) -> Iterator[list[LayerModules]]:
    """The layers as each row of the table would have them, where the modules are there at all.

    Which row is right, if any, a probe has to show.
    """
    # The probe runs on text or pictures, through one stack of layers.
    runs = model.main_input_name in ("input_ids", "pixel_values")
    runs = runs and not model.config.is_encoder_decoder
    for family in dict.fromkeys(FAMILIES.values()) if runs else ():
        modules = _resolve(model, family)
        if modules is not None:
            yield modules


def unknown_layers(model: Any) -> UnknownArchitectureError:
    """The error for a model that no row fits."""
    return UnknownArchitectureError(
        f"Where a {model.config.model_type} model keeps its attention and MLP is not known.",
        f"Known families: {', '.join(sorted(FAMILIES))}.",
        code="unknown-family",
    )


def layers_elsewhere(model_type: str) -> UnknownArchitectureError:
    """The error for a model of a known family that its row doesn't fit."""
    return UnknownArchitectureError(
        f"This {model_type} model does not keep its layers where the family does.",
        "Another version of transformers may help: 4.57 and 5 are known to work.",
        code="layers-elsewhere",
    )


def refuse_differing(verdict: ProbeVerdict, model: Any) -> None:
    """Refuses a model whose layers are not what the table says."""
    if verdict == "differs":
        raise UnknownArchitectureError(
            f"In {type(model).__name__} the attention and MLP outputs don't add up to the "
            "residual stream, so their importance can't be told.",
            "This configuration of the model family is not supported.",
            code="not-additive",
        )


def _discover(model: Any) -> list[LayerModules]:
    for module in candidate_layers(model):
        if probe(model, module) == "adds_up":
            return module
    raise unknown_layers(model)


def _resolve(
    model: Any, family: Family, depth: int | None = None, *, first: int = 0
) -> list[LayerModules] | None:
    """Follows a row's paths; None where one leads nowhere or a layer lacks a part."""
    layers = _follow(model.base_model, family.layers)
    expected = depth or getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is None or not hasattr(layers, "__len__") or len(layers) != expected:
        return None
    form = _form(model.config, family)
    multiplier = getattr(model.config, family.multiplier, None) if family.multiplier else 1.0
    if multiplier is None:
        return None
    paths = [family.attention, family.mlp]
    reads = [family.attention_reads or family.attention, family.mlp_reads or family.mlp]
    paths += [family.attention_norm, family.mlp_norm] if form == "post_norm" else []
    crossing = [path for path in (family.cross_attention, family.cross_attention_norm) if path]
    modules = []
    for number, layer in enumerate(layers, first):
        attention, mlp, *norms = (_follow(layer, path) for path in paths)
        read = [_follow(layer, path) for path in reads]
        cross = [_follow(layer, path) for path in crossing]
        if None in (attention, mlp, *norms, *read, *cross):
            return None
        norms = norms or [None, None]
        modules.append(
            LayerModules(number, layer, attention, mlp, form, multiplier, *norms, *read, *cross)
        )
    return modules


def _form(config: Any, family: Family) -> ResidualForm:
    if "always" in family.parallel_if:
        return "parallel"
    if any(getattr(config, entry, False) for entry in family.parallel_if):
        return "parallel"
    if family.attention_norm and not getattr(config, family.post_norm_unless or "-", False):
        return "post_norm"
    return "sequential"


def _follow(root: Any, paths: str) -> Any:
    """The first of several dotted paths that leads to a module; None if none does."""
    for path in paths.split("|"):
        here = root
        for name in path.split("."):
            here = getattr(here, name, None)
        if here is not None:
            return here
    return None
