"""How each kind of graph is run: what goes in, what comes out, and which steps follow each other.

A part is a PyTorch module over plain tensors by name, exported as one ONNX file. The same steps
run through the module and through the file, each side continuing from its own caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from exporter.onnx_interface import InterfaceModule, cache_argument, interface_of, new_cache
from tests.architectures.catalogue import Architecture

Tensors = dict[str, torch.Tensor]

BATCH, PADDED = 2, 2
_PROMPT, _TOTAL = 6, 7
_SOURCE = 5  # tokens that an encoder reads


@dataclass
class Part:
    """One exported file.

    Attributes:
        name: Of the file.
        module: Takes its inputs by name as one dictionary, gives a list of outputs.
        example: Inputs to trace with; no size that varies is 1, and no two are the same.
        dynamic: The names of the axes that vary, by input.
        outputs: The outputs' names; the first is what the residual stream ends in.
    """

    name: str
    module: torch.nn.Module
    example: Tensors
    dynamic: dict[str, dict[int, str]]
    outputs: list[str]


@dataclass
class Step:
    """One run.

    Attributes:
        phase: What it is called in messages.
        part: The number of the file that runs.
        inputs: What is given, by name.
        carried: Which inputs come from which outputs of earlier steps.
        real: Where the main output's positions are no padding, ``[batch, sequence]``; None: all.
        cached: The same for what caches hold, ``[batch, total]``.
        source: The same for what an encoder gave, ``[batch, source]``.
    """

    phase: str
    part: int
    inputs: Tensors
    carried: dict[str, str] = field(default_factory=dict)
    real: torch.Tensor | None = None
    cached: torch.Tensor | None = None
    source: torch.Tensor | None = None


@dataclass
class Subject:
    """A model as one or several graphs, and the steps that show what they compute."""

    parts: list[Part]
    steps: list[Step]


def subject_of(architecture: Architecture, model: Any) -> Subject:
    """The graphs of a model and their steps."""
    return _KINDS[architecture.graph](architecture, model)


class _Forward(torch.nn.Module):
    """A function of the model and its inputs, as a module."""

    def __init__(self, model: torch.nn.Module, function: Callable[..., list[torch.Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, inputs: Tensors) -> list[torch.Tensor]:
        return self.function(self.model, inputs)


def _ids(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    # The first ids are special in some models: padding, begin, end, mask.
    return torch.randint(6, vocabulary, (BATCH, length), generator=generator)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _mask(length: int, *, left: bool) -> torch.Tensor:
    """Ones; the second row is padded."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, slice(0, PADDED) if left else slice(length - PADDED, length)] = 0
    return mask


def _tokens_decoder(architecture: Architecture, model: Any) -> Subject:
    """Through the exporter's own interface: one graph for prefill and decode."""
    interface = interface_of(model)
    flat = InterfaceModule(model, interface)

    def run(_model: Any, inputs: Tensors) -> list[torch.Tensor]:
        tokens = {name: inputs[name] for name in interface.token_inputs}
        return flat(tokens, [inputs[name] for name in interface.past_names])

    part = Part("model", _Forward(model, run), {}, {}, interface.output_names)
    ids = _ids(model, _TOTAL)
    mask = _mask(_TOTAL, left=bool(interface.cache))
    if not interface.cache:
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        tokens = {name: values[name] for name in interface.token_inputs}
        return Subject([part], [Step("encode", 0, tokens, real=mask.bool())])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    carried = dict(zip(interface.past_names, interface.present_names, strict=True))
    empty = dict(zip(interface.past_names, interface.random_past(BATCH, 0), strict=True))
    steps = []
    for phase, new in (("prefill", slice(0, _PROMPT)), ("decode", slice(_PROMPT, _TOTAL))):
        values = {"input_ids": ids[:, new], "position_ids": positions[:, new]}
        values["attention_mask"] = mask[:, : new.stop]
        tokens = {name: values[name].contiguous() for name in interface.token_inputs}
        step = Step(phase, 0, tokens, {}, mask[:, new].bool(), mask[:, : new.stop].bool())
        if phase == "prefill":
            step.inputs |= empty
        else:
            step.carried = carried
        steps.append(step)
    return Subject([part], steps)


def _vision(architecture: Architecture, model: Any) -> Subject:
    config = model.config
    pixels = _noise(BATCH, config.num_channels, config.image_size, config.image_size)

    def run(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        return [model(**inputs).last_hidden_state]

    part = Part(
        "model",
        _Forward(model, run),
        {"pixel_values": pixels},
        {"pixel_values": {0: "batch"}},
        ["last_hidden_state"],
    )
    return Subject([part], [Step("encode", 0, {"pixel_values": pixels})])


def _audio(architecture: Architecture, model: Any) -> Subject:
    def run(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        return [model(**inputs).last_hidden_state]

    config = model.config
    if hasattr(config, "num_mel_bins"):
        sound = _noise(BATCH, config.max_length, config.num_mel_bins)
        dynamic = {0: "batch"}
    else:
        sound = _noise(BATCH, 800)
        dynamic = {0: "batch"}
    part = Part(
        "model",
        _Forward(model, run),
        {"input_values": sound},
        {"input_values": dynamic},
        ["last_hidden_state"],
    )
    return Subject([part], [Step("encode", 0, {"input_values": sound})])


def _source(model: Any) -> tuple[Tensors, torch.Tensor | None, dict[str, dict[int, str]]]:
    """What an encoder reads, its mask, and the axes that vary."""
    if model.main_input_name == "input_features":
        config = model.config
        sound = _noise(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": sound}, None, {"input_features": {0: "batch"}}
    mask = _mask(_SOURCE, left=False)
    inputs = {"input_ids": _ids(model, _SOURCE), "attention_mask": mask}
    return inputs, mask.bool(), {name: {0: "batch", 1: "source"} for name in inputs}


def _seq2seq_encoder(architecture: Architecture, model: Any) -> Subject:
    inputs, real, dynamic = _source(model)

    def run(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        return [model.get_encoder()(**inputs).last_hidden_state]

    part = Part("encoder_model", _Forward(model, run), inputs, dynamic, ["last_hidden_state"])
    return Subject([part], [Step("encode", 0, inputs, real=real)])


def _seq2seq_decoder(architecture: Architecture, model: Any) -> Subject:
    """As optimum writes it: a graph without past that fills the caches, and one with past."""
    from transformers import EncoderDecoderCache

    source, real, _ = _source(model)
    with torch.no_grad():
        states = model.get_encoder()(**source).last_hidden_state
    begin = {"input_ids": _ids(model, 3, seed=2), "encoder_hidden_states": states}
    if real is not None:
        begin["encoder_attention_mask"] = source["attention_mask"]

    def call(model: Any, inputs: Tensors, cache: Any, states: torch.Tensor) -> Any:
        arguments = {"decoder_input_ids": inputs["input_ids"], "encoder_outputs": (states,)}
        if real is not None:
            arguments["attention_mask"] = inputs["encoder_attention_mask"]
        return model(**arguments, **{cache_argument(model): cache}, use_cache=True)

    def first(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        cache = EncoderDecoderCache(new_cache(), new_cache())
        logits = call(model, inputs, cache, inputs["encoder_hidden_states"]).logits
        return [logits, *_flat(cache.self_attention_cache), *_flat(cache.cross_attention_cache)]

    def following(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        kept = [new_cache(), new_cache()]
        for layer in range(layers):
            for cache, side in zip(kept, ("decoder", "encoder"), strict=True):
                names = [f"past_key_values.{layer}.{side}.{part}" for part in ("key", "value")]
                cache.update(*(inputs[name] for name in names), layer)
        width = inputs["past_key_values.0.encoder.key"].shape[2]
        nothing = torch.zeros(inputs["input_ids"].shape[0], width, states.shape[-1])
        cache = EncoderDecoderCache(*kept)
        return [call(model, inputs, cache, nothing).logits, *_flat(cache.self_attention_cache)]

    layers = len(
        model.get_decoder().layers
        if hasattr(model.get_decoder(), "layers")
        else model.get_decoder().block
    )
    sides = {side: _cache_names("present", layers, f".{side}") for side in ("decoder", "encoder")}
    presents = [*sides["decoder"], *sides["encoder"]]
    pasts = [name.replace("present", "past_key_values") for name in presents]
    length = {"decoder": "past_sequence", "encoder": "source"}
    width = {0: "batch"} if real is None else {0: "batch", 1: "source"}
    dynamic = {"input_ids": {0: "batch", 1: "sequence"}, "encoder_hidden_states": width}
    if real is not None:
        dynamic["encoder_attention_mask"] = width
    one = Part("decoder_model", _Forward(model, first), begin, dynamic, ["logits", *presents])

    next_tokens = {name: value for name, value in begin.items() if name != "encoder_hidden_states"}
    with torch.no_grad():
        caches = dict(zip(pasts, one.module(begin)[1:], strict=True))
    if real is None:  # an encoder's own length never varies
        length["encoder"] = ""
    axes = {
        name: {0: "batch"} | ({2: axis} if (axis := length[name.split(".")[2]]) else {})
        for name in pasts
    }
    example = {**next_tokens, "input_ids": _ids(model, 2, seed=3)}
    example |= {name: value for name, value in caches.items()}
    # Four tokens, since no two of the axes may have the same size.
    longer = one.module({**begin, "input_ids": _ids(model, 4, seed=3)})
    example |= dict(zip(pasts, longer[1:], strict=True))
    dynamic = {name: axis for name, axis in dynamic.items() if name in example} | axes
    two = Part(
        "decoder_with_past_model", _Forward(model, following), example, dynamic,
        ["logits", *sides["decoder"]],
    )  # fmt: skip
    steps = [
        Step("prefill", 0, begin, source=real),
        Step(
            "decode", 1, {**next_tokens, "input_ids": _ids(model, 1, seed=4)},
            dict(zip(pasts, presents, strict=True)),
        ),
    ]  # fmt: skip
    return Subject([one, two], steps)


def _cache_names(stem: str, layers: int, side: str = "") -> list[str]:
    return [f"{stem}.{layer}{side}.{part}" for layer in range(layers) for part in ("key", "value")]


def _flat(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _hybrid_decoder(architecture: Architecture, model: Any) -> Subject:
    """A graph for the prompt that fills caches and states, and one for single tokens after it."""
    argument = cache_argument(model)
    ids, mask = _ids(model, _TOTAL), _mask(_TOTAL, left=True)

    def empty() -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def first(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        cache = empty()
        output = model(**inputs, **{argument: cache}, use_cache=True)
        return [output.logits, *(value for _, value in _states(cache))]

    def following(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        cache = empty()
        _fill(cache, {name: value for name, value in inputs.items() if name.startswith("past")})
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        output = model(**tokens, **{argument: cache}, use_cache=True)
        return [output.logits, *(value for _, value in _states(cache))]

    begin = {"input_ids": ids[:, :_PROMPT], "attention_mask": mask[:, :_PROMPT]}
    cache = empty()
    with torch.no_grad():
        model(**begin, **{argument: cache}, use_cache=True)
    found = _states(cache)
    presents = [name for name, _ in found]
    pasts = [name.replace("present", "past", 1) for name in presents]
    tokens = {0: "batch"} if architecture.traced_length_only else {0: "batch", 1: "sequence"}
    one = Part(
        "model", _Forward(model, first), begin, {"input_ids": tokens, "attention_mask": tokens},
        ["logits", *presents],
    )  # fmt: skip
    single = {"input_ids": ids[:, _PROMPT:], "attention_mask": mask}
    example = {**single, **{n: v.clone() for n, (_, v) in zip(pasts, found, strict=True)}}
    lengths = {} if architecture.traced_length_only else {2: "past_sequence"}
    dynamic = {
        name: {0: "batch"} | (lengths if name.endswith(("key", "value")) else {}) for name in pasts
    }
    dynamic["input_ids"] = {0: "batch"}
    dynamic["attention_mask"] = {0: "batch"} | ({1: "total_sequence"} if lengths else {})
    two = Part(
        "model_with_past", _Forward(model, following), example, dynamic, ["logits", *presents]
    )
    steps = [
        Step(
            "prefill", 0, begin, {}, begin["attention_mask"].bool(), begin["attention_mask"].bool()
        ),
        Step("decode", 1, single, dict(zip(pasts, presents, strict=True)), cached=mask.bool()),
    ]
    return Subject([one, two], steps)


def _states(cache: Any) -> list[tuple[str, torch.Tensor]]:
    """Everything that a cache keeps, under its name as an output."""
    found = []
    for number, layer in enumerate(cache.layers):
        for part, name in (("keys", "key"), ("values", "value")):
            value = getattr(layer, part, None)
            if value is not None:
                found.append((f"present.{number}.{name}", value))
        for part, name in (("conv_states", "conv"), ("recurrent_states", "recurrent")):
            for place, value in getattr(layer, part, {}).items():
                if value is not None:
                    suffix = f"_{place}" if place else ""
                    found.append((f"present.{number}.{name}{suffix}", value))
    return found


def _fill(cache: Any, past: Tensors) -> None:
    """Puts what was kept into a cache."""
    keys: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in past.items():
        _, number, part = name.split(".")
        layer = cache.layers[int(number)]
        if part in ("key", "value"):
            keys.setdefault(int(number), {})[part] = value
            continue
        kind, _, place = part.partition("_")
        place_number = int(place or 0)
        # A copy, since the state is written in place.
        if kind == "conv":
            layer.conv_states[place_number] = value.clone()
            layer.is_conv_states_initialized[place_number] = True
            layer.conv_kernel_size[place_number] = value.shape[-1]
        else:
            layer.recurrent_states[place_number] = value.clone()
            layer.is_recurrent_states_initialized[place_number] = True
        layer.has_previous_state[place_number] = True
        layer.device, layer.dtype = value.device, value.dtype
    for number, both in keys.items():
        cache.update(both["key"], both["value"], number)


_KINDS: dict[str, Callable[[Architecture, Any], Subject]] = {
    "decoder": _tokens_decoder,
    "encoder": _tokens_decoder,
    "vision": _vision,
    "audio": _audio,
    "seq2seq encoder": _seq2seq_encoder,
    "seq2seq decoder": _seq2seq_decoder,
    "hybrid decoder": _hybrid_decoder,
}
