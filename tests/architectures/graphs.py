"""A model as graphs, and the steps in which they are run and held against PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from exporter.models.onnx_interface import (
    InterfaceModule,
    OnnxInterface,
    cache_argument,
    interface_of,
    new_cache,
)
from tests.architectures.catalogue import Architecture
from tests.trials import Part

Tensors = dict[str, torch.Tensor]
Axes = dict[str, dict[int, str]]

BATCH, PADDED = 2, 2
PROMPT, TOTAL = 6, 7  # tokens before the last one, and with it
_SOURCE = 5  # tokens that an encoder reads for a decoder
_SAMPLES = 800  # of a sound


@dataclass
class Step:
    """One run of a part; what it carries comes from the steps before, by name."""

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
    kind = architecture.graph
    if kind in ("decoder", "encoder"):
        return _over_tokens(model)
    if kind in ("vision", "audio"):
        return _features(model)
    if kind == "hybrid decoder":
        return _hybrid_decoder(model, varies=not architecture.traced_length_only)
    return _seq2seq_encoder(model) if kind == "seq2seq encoder" else _Decoder(model).subject()


def random_ids(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    """Ids ``[batch, length]`` of no special tokens, which come first in most vocabularies."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(6, vocabulary, (BATCH, length), generator=generator)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def padded_mask(length: int, *, left: bool) -> torch.Tensor:
    """Ones ``[batch, length]``; the second row is padded."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, slice(0, PADDED) if left else slice(length - PADDED, length)] = 0
    return mask


def part_of_interface(model: Any, interface: OnnxInterface, example: Tensors) -> Part:
    """A graph as the exporter's own interface has it, for prefill and decode."""
    inner = InterfaceModule(model, interface)

    def run(_model: Any, inputs: Tensors) -> Any:
        tokens = {name: inputs[name] for name in interface.token_inputs}
        return inner(tokens, [inputs[name] for name in interface.past_names])

    return Part("model", model, run, interface.output_names, example)


def token_inputs(
    interface: OnnxInterface, ids: torch.Tensor, mask: torch.Tensor, new: slice
) -> Tensors:
    """What a model reads for some of the tokens."""
    values = {
        "input_ids": ids[:, new],
        "attention_mask": mask[:, : new.stop],
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, new],
        "token_type_ids": torch.zeros_like(ids[:, new]),
    }
    return {name: values[name].contiguous() for name in interface.token_inputs}


def _over_tokens(model: Any) -> Subject:
    interface = interface_of(model)
    ids, mask = random_ids(model, TOTAL), padded_mask(TOTAL, left=bool(interface.cache))

    def step(new: slice) -> Step:
        real, cached = mask[:, new].bool(), mask[:, : new.stop].bool()
        return Step(0, token_inputs(interface, ids, mask, new), real=real, cached=cached)

    part = part_of_interface(model, interface, {})
    if not interface.cache:
        return Subject([part], [step(slice(0, TOTAL))])
    names, (prefill, decode) = (
        interface.past_names,
        map(step, (slice(0, PROMPT), slice(PROMPT, TOTAL))),
    )
    prefill.inputs |= dict(zip(names, interface.random_past(BATCH, 0), strict=True))
    decode.carried = dict(zip(names, interface.present_names, strict=True))
    return Subject([part], [prefill, decode])


def _features(model: Any) -> Subject:
    """A picture, a spectrogram or a sound, of one size."""
    config, name = model.config, model.main_input_name
    shape: tuple[int, ...] = (_SAMPLES,)
    if name == "pixel_values":
        shape = (config.num_channels, config.image_size, config.image_size)
    elif hasattr(config, "num_mel_bins"):
        shape = (config.max_length, config.num_mel_bins)
    inputs, axes = {name: _noise(BATCH, *shape)}, {name: {0: "batch"}}
    part = Part("model", model, _hidden_state, ["last_hidden_state"], inputs, axes)
    return Subject([part], [Step(0, inputs)])


def _hidden_state(model: Any, inputs: Tensors) -> list[torch.Tensor]:
    return [model(**inputs).last_hidden_state]


_KEPT = {
    "key": "keys", "value": "values", "conv": "conv_states", "recurrent": "recurrent_states",
}  # fmt: skip
"""By the names of a cache's parts in graphs, those of transformers."""
_GROWS = ("key", "value")


def _hybrid_decoder(model: Any, *, varies: bool) -> Subject:
    """A graph for the prompt that fills caches and states, and one for single tokens after it."""
    from transformers import DynamicCache

    def run(tokens: Tensors, cache: Any) -> Tensors:
        """The logits, and everything that the cache keeps under its name as an output."""
        output = model(**tokens, **{cache_argument(model): cache}, use_cache=True)
        kept: Tensors = {"logits": output.logits}
        for (number, layer), (name, attribute) in product(enumerate(cache.layers), _KEPT.items()):
            value = getattr(layer, attribute, None if name in _GROWS else [None])
            if (value := value if name in _GROWS else value[0]) is not None:
                kept[f"present.{number}.{name}"] = value
        return kept

    def first(_model: Any, inputs: Tensors) -> Any:
        return run(inputs, DynamicCache(config=model.config)).values()

    def following(_model: Any, inputs: Tensors) -> Any:
        cache = DynamicCache(config=model.config)
        _fill(cache, {name: value for name, value in inputs.items() if name.startswith("past")})
        return run({name: inputs[name] for name in single}, cache).values()

    ids, mask = random_ids(model, TOTAL), padded_mask(TOTAL, left=True)
    begin = {"input_ids": ids[:, :PROMPT], "attention_mask": mask[:, :PROMPT]}
    single = {"input_ids": ids[:, PROMPT:], "attention_mask": mask}
    with torch.no_grad():
        _, *presents = outputs = run(begin, DynamicCache(config=model.config))
    if not any(name.endswith(_GROWS) for name in presents):
        del single["attention_mask"]  # of models of states alone it hides the new tokens only
    pasts = [name.replace("present", "past", 1) for name in presents]
    example = single | {
        past: outputs[name].clone() for past, name in zip(pasts, presents, strict=True)
    }
    prompt = dict.fromkeys(begin, {0: "batch"} | ({1: "sequence"} if varies else {}))
    axes: Axes = {name: {0: "batch"} for name in example}
    for name in example if varies else ():
        axes[name] |= {1: "total_sequence"} if name == "attention_mask" else {}
        axes[name] |= {2: "past_sequence"} if name.endswith(_GROWS) else {}
    real = begin["attention_mask"].bool()
    carried = dict(zip(pasts, presents, strict=True))
    return Subject(
        [
            Part("model", model, first, [*outputs], begin, prompt),
            Part("model_with_past", model, following, [*outputs], example, axes),
        ],
        [Step(0, begin, real=real, cached=real), Step(1, single, carried, cached=mask.bool())],
    )


def _fill(cache: Any, past: Tensors) -> None:
    """Puts what was kept into a cache."""
    for name, value in past.items():
        _, number, part = name.split(".")
        layer = cache.layers[int(number)]
        if part == "key":
            cache.update(value, past[name.removesuffix("key") + "value"], int(number))
        elif part != "value":
            # A copy, since a state is written in place.
            getattr(layer, _KEPT[part])[0] = value.clone()
            getattr(layer, f"is_{_KEPT[part]}_initialized")[0] = True
            if part == "conv":
                layer.conv_kernel_size[0] = value.shape[-1]
            layer.has_previous_state[0] = True
            layer.device, layer.dtype = value.device, value.dtype


def _source(model: Any) -> tuple[Tensors, torch.Tensor | None]:
    """What the encoder reads, and where that is no padding; a sound of one length has none."""
    config = model.config
    if model.main_input_name == "input_features":
        sound = _noise(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": sound}, None
    mask = padded_mask(_SOURCE, left=False)
    return {"input_ids": random_ids(model, _SOURCE), "attention_mask": mask}, mask.bool()


def _seq2seq_encoder(model: Any) -> Subject:
    inputs, real = _source(model)

    def run(model: Any, inputs: Tensors) -> list[torch.Tensor]:
        return _hidden_state(model.get_encoder(), inputs)

    axes = dict.fromkeys(inputs, {0: "batch"} if real is None else {0: "batch", 1: "source"})
    part = Part("encoder_model", model, run, ["last_hidden_state"], inputs, axes)
    return Subject([part], [Step(0, inputs, real=real)])


class _Decoder:
    """As optimum writes it: a first step, which fills both caches, and further ones."""

    def __init__(self, model: Any) -> None:
        self._model = model
        source, self._real = _source(model)
        with torch.no_grad():
            self._states = model.get_encoder()(**source).last_hidden_state
        self._source: Tensors = {}
        if self._real is not None:
            self._source["encoder_attention_mask"] = source["attention_mask"]
        decoder = model.get_decoder()
        self._layers = len(decoder.layers if hasattr(decoder, "layers") else decoder.block)

    def subject(self) -> Subject:
        presents = [
            f"present.{layer}.{side}.{part}"
            for side in ("decoder", "encoder")
            for layer, part in product(range(self._layers), ("key", "value"))
        ]
        pasts = [name.replace("present", "past_key_values") for name in presents]
        begin = {**self._tokens(3), "encoder_hidden_states": self._states}
        # Four tokens of past, since no two of the axes may have the same size.
        past = self._call(self._model, {**begin, **self._tokens(4)})[1:]
        example = {**self._tokens(2), **dict(zip(pasts, past, strict=True))}
        own = ["logits", *(name for name in presents if ".decoder." in name)]
        first = ("decoder_model", self._model, self._call, ["logits", *presents], begin)
        following = ("decoder_with_past_model", self._model, self._call, own, example)
        parts = [Part(*first, self._axes(begin)), Part(*following, self._axes(example))]
        carried = dict(zip(pasts, presents, strict=True))
        return Subject(
            parts, [Step(0, begin, source=self._real), Step(1, self._tokens(1), carried)]
        )

    def _tokens(self, length: int) -> Tensors:
        return {"input_ids": random_ids(self._model, length, seed=length), **self._source}

    def _axes(self, inputs: Tensors) -> Axes:
        axes: Axes = {name: {0: "batch"} for name in inputs}
        for name in inputs:
            if name == "input_ids":
                axes[name] |= {1: "sequence"}
            elif ".decoder." in name:
                axes[name] |= {2: "past_sequence"}
            elif self._real is not None:
                axes[name] |= {2 if name.startswith("past") else 1: "source"}
        return axes

    def _call(self, model: Any, inputs: Tensors) -> list[torch.Tensor]:
        """The logits and caches: of both sides at the first step, then the decoder's own."""
        from transformers import EncoderDecoderCache

        caches, states = [new_cache(), new_cache()], inputs.get("encoder_hidden_states")
        if is_later := states is None:  # the cache holds what was made of them
            for layer in range(self._layers):
                for cache, side in zip(caches, ("decoder", "encoder"), strict=True):
                    stem = f"past_key_values.{layer}.{side}"
                    cache.update(inputs[f"{stem}.key"], inputs[f"{stem}.value"], layer)
            length = inputs["past_key_values.0.encoder.key"].shape[2]
            size = self._states.shape[-1]
            states = torch.zeros(inputs["input_ids"].shape[0], length, size)
        mask = inputs.get("encoder_attention_mask")
        output = model(
            decoder_input_ids=inputs["input_ids"],
            encoder_outputs=(states,),
            **({} if mask is None else {"attention_mask": mask}),
            **{cache_argument(model): EncoderDecoderCache(*caches)},
            use_cache=True,
        )
        kept = [layer for cache in caches[: 1 if is_later else 2] for layer in cache.layers]
        return [output.logits, *(value for layer in kept for value in (layer.keys, layer.values))]
