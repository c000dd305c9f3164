"""How each kind of graph is run: what goes in and comes out, and which steps follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from exporter.models.onnx_interface import InterfaceModule, OnnxInterface, interface_of
from tests.architectures.catalogue import Architecture
from tests.architectures.hybrid_graphs import hybrid_decoder
from tests.architectures.seq2seq_graphs import seq2seq_decoder, seq2seq_encoder
from tests.architectures.subjects import (
    BATCH,
    PROMPT,
    TOTAL,
    Forward,
    Part,
    Step,
    Subject,
    Tensors,
    noise,
    padded_mask,
    random_ids,
)

_SAMPLES = 800  # of a sound


def subject_of(architecture: Architecture, model: Any) -> Subject:
    """The graphs of a model and their steps."""
    return _KINDS[architecture.graph](architecture, model)


def _over_tokens(architecture: Architecture, model: Any) -> Subject:
    """Through the exporter's own interface: one graph for prefill and decode."""
    interface = interface_of(model)
    flat = InterfaceModule(model, interface)

    def run(_model: Any, inputs: Tensors) -> list[torch.Tensor]:
        tokens = {name: inputs[name] for name in interface.token_inputs}
        return flat(tokens, [inputs[name] for name in interface.past_names])

    part = Part("model", Forward(model, run), interface.output_names)
    ids, mask = random_ids(model, TOTAL), padded_mask(TOTAL, left=bool(interface.cache))
    if not interface.cache:
        return Subject([part], [_step("encode", interface, ids, mask, slice(0, TOTAL))])
    names = interface.past_names
    prefill = _step("prefill", interface, ids, mask, slice(0, PROMPT))
    prefill.inputs |= dict(zip(names, interface.random_past(BATCH, 0), strict=True))
    decode = _step("decode", interface, ids, mask, slice(PROMPT, TOTAL))
    decode.carried = dict(zip(names, interface.present_names, strict=True))
    return Subject([part], [prefill, decode])


def _step(
    phase: str, interface: OnnxInterface, ids: torch.Tensor, mask: torch.Tensor, new: slice
) -> Step:
    values = {
        "input_ids": ids[:, new],
        "attention_mask": mask[:, : new.stop],
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, new],
        "token_type_ids": torch.zeros_like(ids[:, new]),
    }
    tokens = {name: values[name].contiguous() for name in interface.token_inputs}
    return Step(phase, 0, tokens, real=mask[:, new].bool(), cached=mask[:, : new.stop].bool())


def _vision(architecture: Architecture, model: Any) -> Subject:
    config = model.config
    shape = (BATCH, config.num_channels, config.image_size, config.image_size)
    return _single_input(model, "pixel_values", noise(*shape))


def _audio(architecture: Architecture, model: Any) -> Subject:
    config = model.config
    is_spectrogram = hasattr(config, "num_mel_bins")
    shape = (config.max_length, config.num_mel_bins) if is_spectrogram else (_SAMPLES,)
    return _single_input(model, "input_values", noise(BATCH, *shape))


def _single_input(model: Any, name: str, value: torch.Tensor) -> Subject:
    def run(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        return [model(**inputs).last_hidden_state]

    inputs, outputs = {name: value}, ["last_hidden_state"]
    part = Part("model", Forward(model, run), outputs, inputs, {name: {0: "batch"}})
    return Subject([part], [Step("encode", 0, inputs)])


_KINDS: dict[str, Callable[[Architecture, Any], Subject]] = {
    "decoder": _over_tokens,
    "encoder": _over_tokens,
    "vision": _vision,
    "audio": _audio,
    "seq2seq encoder": seq2seq_encoder,
    "seq2seq decoder": seq2seq_decoder,
    "hybrid decoder": hybrid_decoder,
}
