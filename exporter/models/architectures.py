"""Finds a model's layers and sublayers, by the table of families or by their usual names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exporter.artifacts.stacks import Deleted, Stacks
from exporter.errors import UnknownArchitectureError
from exporter.models.families import FAMILIES, GENERATING, STACKS, Family
from exporter.models.residual_stream import LayerModules, ResidualForm, probe
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


def layer_modules(model: Any, *, both: bool = False) -> list[LayerModules]:
    """Finds the modules of every layer.

    A model type that is not in the table is held against every row; a row is taken only when a
    small forward pass shows that the branches which it names add up to the residual stream.

    both: of an encoder-decoder those of both stacks, the encoder's first, numbered through.
    """
    kind, stacked = model.config.model_type, model.config.is_encoder_decoder
    if kind in STACKS and stacked and not both:
        raise UnknownArchitectureError(
            f"{type(model).__name__} is an encoder-decoder, and this takes one stack of layers.",
            "score, plan, export and compare take encoder-decoders.",
            code="two-stacks",
        )
    if stacked and both:
        if kind not in STACKS or not type(model).__name__.endswith(GENERATING):
            raise unknown_layers(model)
        depths = Stacks.of(model.config)
        parts = [
            _resolve(model, STACKS[kind][0], depths.encoder),
            _resolve(model, STACKS[kind][1], depths.decoder, first=depths.encoder),
        ]
        modules = [layer for part in parts if part for layer in part]
        if not all(parts):
            raise unknown_layers(model)
        return modules
    if kind in FAMILIES:
        result = _resolve(model, FAMILIES[kind])
    else:
        rows = candidate_layers(model)
        result = next((layers for layers in rows if probe(model, layers) == "adds_up"), None)
    if result is None:
        raise unknown_layers(model)
    return result


def every_sublayer(model: Any) -> list[SublayerModules]:
    """As :func:`sublayers`, also of an encoder-decoder: both stacks, cross-attentions too."""
    layers = layer_modules(model, both=True)
    decoding = [modules.number for modules in layers if modules.cross_attention is not None]
    encoder = min(decoding, default=0)
    return [replace(part, reads_sources=part.layer < encoder) for part in sublayers_of(layers)]


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
    layers = layer_modules(model, both=True)
    decoding = sum(modules.cross_attention is not None for modules in layers)
    return Stacks(len(layers) - decoding, decoding).every(deletions)


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
    """The error for a model that no row fits, or whose own row doesn't."""
    return UnknownArchitectureError(
        f"Where {type(model).__name__} ({model.config.model_type}) keeps its attention and MLP is "
        "not known, or what they give does not add up to its residual stream.",
        f"Known families: {', '.join(sorted({*FAMILIES, *STACKS}))}; transformers 4.57 and 5 are "
        "known to work.",
        code="unknown-family",
    )


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
