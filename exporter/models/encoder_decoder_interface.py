"""The three graphs of an encoder-decoder, and how PyTorch is called as each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch

from exporter.artifacts.stacks import Stacks
from exporter.errors import ExportError
from exporter.models.architectures import layer_modules
from exporter.models.model_folder import ENCODER, FIRST_STEP, NEXT_STEP, Graph
from exporter.models.onnx_interface import cache_argument, new_cache
from exporter.models.residual_stream import encoder_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Side = Literal["decoder", "encoder"]
"""Whose keys and values a cache holds, in optimum's words: ``encoder`` is cross-attention's."""
Tensors = dict[str, torch.Tensor]

# Sizes of the trace: 1 would be taken for a constant, and equal sizes for one dimension.
_BATCH, _SOURCE, _TOKENS, _STEP, _PAST = 2, 5, 3, 2, 4


@dataclass(frozen=True)
class EncoderDecoderInterface:
    """What goes in and what comes out of each graph."""

    stacks: Stacks
    reads_audio: bool
    heads: int
    head_size: int
    cache_argument: str
    dtype: torch.dtype

    def cache_names(self, stem: str, sides: Sequence[Side] = ("decoder", "encoder")) -> list[str]:
        """The caches of each of the decoder's layers: ``present.0.decoder.key`` and so on."""
        every = product(range(self.stacks.decoder), sides, ("key", "value"))
        return [f"{stem}.{layer}.{side}.{part}" for layer, side, part in every]

    @property
    def _encoder_mask(self) -> list[str]:
        return [] if self.reads_audio else ["encoder_attention_mask"]

    def inputs(self, graph: Graph) -> list[str]:
        """A graph's inputs, in order."""
        if graph == ENCODER:
            return ["input_features"] if self.reads_audio else ["input_ids", "attention_mask"]
        if graph == FIRST_STEP:
            return ["input_ids", *self._encoder_mask, "encoder_hidden_states"]
        return ["input_ids", *self._encoder_mask, *self.cache_names("past_key_values")]

    def outputs(self, graph: Graph) -> list[str]:
        """A graph's outputs, in order."""
        if graph == ENCODER:
            return ["last_hidden_state"]
        sides: Sequence[Side] = ("decoder", "encoder") if graph == FIRST_STEP else ("decoder",)
        return ["logits", *self.cache_names("present", sides)]


def interface_of_stacks(model: PreTrainedModel) -> EncoderDecoderInterface:
    """The interface of an encoder-decoder."""
    layer_modules(model, both=True)  # what isn't known was never held against PyTorch
    name = model.main_input_name
    if name not in ("input_ids", "input_features"):
        raise ExportError(
            f"The encoder of {type(model).__name__} reads {name}, which has no graph here.",
            code="takes-no-tokens",
        )
    config: Any = model.config
    heads = getattr(config, "decoder_attention_heads", None) or config.num_heads
    size = getattr(config, "d_kv", None) or config.d_model // heads
    return EncoderDecoderInterface(
        Stacks.of(config), name == "input_features", heads, size, cache_argument(model), model.dtype
    )


class StackModule(torch.nn.Module):
    """An encoder-decoder as one of its graphs: inputs by name, outputs in a list."""

    def __init__(
        self, model: PreTrainedModel, interface: EncoderDecoderInterface, graph: Graph
    ) -> None:
        super().__init__()
        self.model, self.interface, self.graph = model, interface, graph

    def forward(self, inputs: Tensors) -> list[torch.Tensor]:
        """Runs the graph."""
        if self.graph == ENCODER:
            return [self.model.get_encoder()(**inputs).last_hidden_state]
        caches = [new_cache(), new_cache()]
        if self.graph == NEXT_STEP:
            self._fill(caches, inputs)
        return self._decode(inputs, caches)

    def _fill(self, caches: list[Any], inputs: Tensors) -> None:
        for layer in range(self.interface.stacks.decoder):
            for cache, side in zip(caches, ("decoder", "encoder"), strict=True):
                stem = f"past_key_values.{layer}.{side}"
                cache.update(inputs[f"{stem}.key"], inputs[f"{stem}.value"], layer)

    def _decode(self, inputs: Tensors, caches: list[Any]) -> list[torch.Tensor]:
        from transformers import EncoderDecoderCache

        mask = inputs.get("encoder_attention_mask")
        output = self.model(
            decoder_input_ids=inputs["input_ids"],
            encoder_outputs=(self._states(inputs),),
            **({} if mask is None else {"attention_mask": mask}),
            **{self.interface.cache_argument: EncoderDecoderCache(*caches)},
            use_cache=True,
        )
        kept = caches if self.graph == FIRST_STEP else caches[:1]
        layers = [cache.layers[n] for n in range(self.interface.stacks.decoder) for cache in kept]
        return [output.logits, *(value for layer in layers for value in (layer.keys, layer.values))]

    def _states(self, inputs: Tensors) -> torch.Tensor:
        """What the encoder gave; with both caches filled nothing reads more of it than its size."""
        if self.graph == FIRST_STEP:
            return inputs["encoder_hidden_states"]
        keys = inputs["past_key_values.0.encoder.key"]
        width: int = self.model.config.d_model
        return keys.new_zeros(keys.shape[0], keys.shape[2], width)


@dataclass(frozen=True)
class Examples:
    """Inputs to trace each graph with, and the names of the sizes that vary."""

    model: PreTrainedModel
    interface: EncoderDecoderInterface

    def of(self, graph: Graph) -> Tensors:
        """Inputs of one graph; of the others only as much is run as it takes to make them."""
        model, interface = self.model, self.interface
        source = encoder_inputs(model, _ids(model, _SOURCE))
        if graph == ENCODER:
            return source
        given = {}
        if "attention_mask" in source:
            given["encoder_attention_mask"] = source["attention_mask"]
        with torch.no_grad():
            (states,) = StackModule(model, interface, ENCODER)(source)
            first = {**given, "encoder_hidden_states": states}
            if graph == FIRST_STEP:
                return {"input_ids": _ids(model, _TOKENS), **first}
            begun = {"input_ids": _ids(model, _PAST), **first}
            _, *caches = StackModule(model, interface, FIRST_STEP)(begun)
        past = dict(zip(interface.cache_names("past_key_values"), caches, strict=True))
        return {"input_ids": _ids(model, _STEP), **given, **past}

    def dimensions(self, graph: Graph) -> dict[str, dict[int, Any]]:
        """For each input, the named dimension of each axis that varies."""
        names = ("batch", "sequence", "source", "past_sequence")
        dims = {name: torch.export.Dim(name) for name in names}
        return {
            name: {axis: dims[word] for axis, word in self._axes(graph, name).items()}
            for name in self.interface.inputs(graph)
        }

    def _axes(self, graph: Graph, name: str) -> dict[int, str]:
        own = {} if self.interface.reads_audio else {1: "source"}
        if name == "input_ids":
            return {0: "batch", 1: "source" if graph == ENCODER else "sequence"}
        if ".decoder." in name:
            return {0: "batch", 2: "past_sequence"}
        if ".encoder." in name:
            return {0: "batch", **({2: "source"} if own else {})}
        return {0: "batch", **own}


def _ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    row = (torch.arange(_BATCH * length).reshape(_BATCH, length) * 7 + 5) % model.config.vocab_size
    ids: torch.Tensor = row.long()
    return ids
