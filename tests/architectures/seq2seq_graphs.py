"""Encoder-decoder models as optimum writes them: encoder, first step, further ones."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from exporter.models.onnx_interface import cache_argument, new_cache
from tests.architectures.catalogue import Architecture
from tests.architectures.subjects import (
    Axes,
    Forward,
    Part,
    Step,
    Subject,
    Tensors,
    noise,
    padded_mask,
    random_ids,
)

_SOURCE = 5  # tokens that the encoder reads


def seq2seq_encoder(architecture: Architecture, model: Any) -> Subject:
    """The encoder."""
    inputs, real = _source(model)

    def run(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        return [model.get_encoder()(**inputs).last_hidden_state]

    axes = {0: "batch"} if real is None else {0: "batch", 1: "source"}
    dynamic = dict.fromkeys(inputs, axes)
    part = Part("encoder_model", Forward(model, run), ["last_hidden_state"], inputs, dynamic)
    return Subject([part], [Step("encode", 0, inputs, real=real)])


def seq2seq_decoder(architecture: Architecture, model: Any) -> Subject:
    """The decoder without a past, which fills both caches, and the decoder with one."""
    return _Decoder(model).subject()


def _source(model: Any) -> tuple[Tensors, torch.Tensor | None]:
    """What the encoder reads, and where that is no padding; a sound of one length has none."""
    config = model.config
    if model.main_input_name == "input_features":
        sound = noise(2, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": sound}, None
    mask = padded_mask(_SOURCE, left=False)
    return {"input_ids": random_ids(model, _SOURCE), "attention_mask": mask}, mask.bool()


class _Decoder:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._argument = cache_argument(model)
        source, self._real = _source(model)
        with torch.no_grad():
            self._states = model.get_encoder()(**source).last_hidden_state
        self._source: Tensors = {}
        if self._real is not None:
            self._source["encoder_attention_mask"] = source["attention_mask"]
        decoder = model.get_decoder()
        self._layers = len(decoder.layers if hasattr(decoder, "layers") else decoder.block)

    def subject(self) -> Subject:
        presents = [*self._names("present", "decoder"), *self._names("present", "encoder")]
        pasts = [name.replace("present", "past_key_values") for name in presents]
        begin = {**self._tokens(3), "encoder_hidden_states": self._states}
        first = Forward(self._model, self._first)
        one = Part("decoder_model", first, ["logits", *presents], begin, self._axes(begin))
        # Four tokens of past, since no two of the axes may have the same size.
        past = first({**begin, **self._tokens(4)})[1:]
        example = {**self._tokens(2), **dict(zip(pasts, past, strict=True))}
        following = Forward(self._model, self._following)
        outputs = ["logits", *self._names("present", "decoder")]
        two = Part("decoder_with_past_model", following, outputs, example, self._axes(example))
        carried = dict(zip(pasts, presents, strict=True))
        steps = [Step("prefill", 0, begin, source=self._real)]
        steps.append(Step("decode", 1, self._tokens(1), carried))
        return Subject([one, two], steps)

    def _tokens(self, length: int) -> Tensors:
        return {"input_ids": random_ids(self._model, length, seed=length), **self._source}

    def _names(self, stem: str, side: str) -> list[str]:
        parts = product(range(self._layers), ("key", "value"))
        return [f"{stem}.{layer}.{side}.{part}" for layer, part in parts]

    def _axes(self, inputs: Tensors) -> Axes:
        source = {} if self._real is None else {1: "source"}
        axes: Axes = {}
        for name in inputs:
            if name == "input_ids":
                axes[name] = {0: "batch", 1: "sequence"}
            elif name.startswith("past"):
                length = {2: "past_sequence"} if ".decoder." in name else {2: "source"}
                axes[name] = {0: "batch"} | (length if source or ".decoder." in name else {})
            else:
                axes[name] = {0: "batch"} | source
        return axes

    def _first(self, model: Any, inputs: Tensors) -> list[torch.Tensor]:
        return self._call(model, inputs, [new_cache(), new_cache()], both=True)

    def _following(self, model: Any, inputs: Tensors) -> list[torch.Tensor]:
        caches = [new_cache(), new_cache()]
        for layer in range(self._layers):
            for cache, side in zip(caches, ("decoder", "encoder"), strict=True):
                stem = f"past_key_values.{layer}.{side}"
                cache.update(inputs[f"{stem}.key"], inputs[f"{stem}.value"], layer)
        return self._call(model, inputs, caches, both=False)

    def _call(
        self, model: Any, inputs: Tensors, caches: list[Any], *, both: bool
    ) -> list[torch.Tensor]:
        from transformers import EncoderDecoderCache

        states = inputs.get("encoder_hidden_states")
        if states is None:  # the cache holds what was made of them
            length = inputs["past_key_values.0.encoder.key"].shape[2]
            size = self._states.shape[-1]
            states = torch.zeros(inputs["input_ids"].shape[0], length, size)
        mask = inputs.get("encoder_attention_mask")
        output = model(
            decoder_input_ids=inputs["input_ids"],
            encoder_outputs=(states,),
            **({} if mask is None else {"attention_mask": mask}),
            **{self._argument: EncoderDecoderCache(*caches)},
            use_cache=True,
        )
        kept = [layer for cache in caches[: 1 + both] for layer in cache.layers]
        return [output.logits, *(value for layer in kept for value in (layer.keys, layer.values))]
