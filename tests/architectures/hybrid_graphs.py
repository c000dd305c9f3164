"""Decoders of which some layers keep a state instead of keys and values."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from exporter.models.onnx_interface import cache_argument
from tests.architectures.catalogue import Architecture
from tests.architectures.subjects import (
    PROMPT,
    TOTAL,
    Axes,
    Forward,
    Part,
    Step,
    Subject,
    Tensors,
    padded_mask,
    random_ids,
)

_KEYS = {"key": "keys", "value": "values"}
_STATES = {"conv": "conv_states", "recurrent": "recurrent_states"}


def hybrid_decoder(architecture: Architecture, model: Any) -> Subject:
    """A graph for the prompt that fills caches and states, and one for single tokens after it."""
    ids, mask = random_ids(model, TOTAL), padded_mask(TOTAL, left=True)
    begin = {"input_ids": ids[:, :PROMPT], "attention_mask": mask[:, :PROMPT]}
    single = {"input_ids": ids[:, PROMPT:], "attention_mask": mask}
    with torch.no_grad():
        states = _run(model, begin, _new_cache(model))[1]
    pasts = {name.replace("present", "past", 1): value for name, value in states.items()}
    outputs = ["logits", *states]
    varies = not architecture.traced_length_only
    one = Part("model", Forward(model, _first), outputs, begin, _prompt_axes(varies))
    example = {**single, **{name: value.clone() for name, value in pasts.items()}}
    axes = _single_axes(pasts, varies)
    two = Part("model_with_past", Forward(model, _following), outputs, example, axes)
    real = begin["attention_mask"].bool()
    steps = [
        Step("prefill", 0, begin, real=real, cached=real),
        Step("decode", 1, single, dict(zip(pasts, states, strict=True)), cached=mask.bool()),
    ]
    return Subject([one, two], steps)


def _prompt_axes(varies: bool) -> Axes:
    axes = {0: "batch"} | ({1: "sequence"} if varies else {})
    return {"input_ids": axes, "attention_mask": axes}


def _single_axes(pasts: Tensors, varies: bool) -> Axes:
    axes: Axes = {"input_ids": {0: "batch"}}
    axes["attention_mask"] = {0: "batch"} | ({1: "total_sequence"} if varies else {})
    for name in pasts:
        grows = varies and name.endswith(tuple(_KEYS))
        axes[name] = {0: "batch"} | ({2: "past_sequence"} if grows else {})
    return axes


def _first(model: Any, inputs: Tensors) -> list[torch.Tensor]:
    logits, states = _run(model, inputs, _new_cache(model))
    return [logits, *states.values()]


def _following(model: Any, inputs: Tensors) -> list[torch.Tensor]:
    cache = _new_cache(model)
    _fill(cache, {name: value for name, value in inputs.items() if name.startswith("past")})
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits, states = _run(model, tokens, cache)
    return [logits, *states.values()]


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _run(model: Any, tokens: Tensors, cache: Any) -> tuple[torch.Tensor, Tensors]:
    """The logits, and everything that the cache keeps under its name as an output."""
    output = model(**tokens, **{cache_argument(model): cache}, use_cache=True)
    kept: Tensors = {}
    for number, layer in enumerate(cache.layers):
        for name, attribute in _KEYS.items():
            if (value := getattr(layer, attribute, None)) is not None:
                kept[f"present.{number}.{name}"] = value
        for name, attribute in _STATES.items():
            if (value := getattr(layer, attribute, {0: None})[0]) is not None:
                kept[f"present.{number}.{name}"] = value
    return output.logits, kept


def _fill(cache: Any, past: Tensors) -> None:
    """Puts what was kept into a cache."""
    keys: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in past.items():
        _, number, part = name.split(".")
        if part in _KEYS:
            keys[int(number)][part] = value
        else:
            _set_state(cache.layers[int(number)], part, value)
    for number, both in keys.items():
        cache.update(both["key"], both["value"], number)


def _set_state(layer: Any, kind: str, value: torch.Tensor) -> None:
    # A copy, since a state is written in place.
    getattr(layer, _STATES[kind])[0] = value.clone()
    getattr(layer, f"is_{_STATES[kind]}_initialized")[0] = True
    if kind == "conv":
        layer.conv_kernel_size[0] = value.shape[-1]
    layer.has_previous_state[0] = True
    layer.device, layer.dtype = value.device, value.dtype
