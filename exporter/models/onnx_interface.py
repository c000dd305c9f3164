"""The inputs and outputs of an exported model, and how PyTorch is called with the same ones."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from exporter.errors import ExportError, first_line, pass_on_memory_error
from exporter.models.branch_modules import structure_of
from exporter.models.model_folder import OF_IMAGES, PIXELS, image_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_TOKENS = 3


@dataclass(frozen=True)
class CacheSlot:
    """What one layer keeps: keys ``[batch, heads, length, key_size]``, values likewise."""

    layer: int
    heads: int
    key_size: int
    value_size: int

    @property
    def parts(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """The names of the two tensors and their sizes of one head."""
        return ("key", self.key_size), ("value", self.value_size)


@dataclass(frozen=True)
class OnnxInterface:
    """What goes in and what comes out."""

    # int64 inputs `[batch, sequence]`, `attention_mask` of the total length
    token_inputs: tuple[str, ...]
    cache: tuple[CacheSlot, ...]
    main_output: str  # `logits` `[batch, sequence, vocabulary]` or `last_hidden_state`
    cache_argument: str
    dtype: torch.dtype
    length_keepers: tuple[int, ...] = ()
    # whether a classifier gives one row of logits for each text or image, `[batch, classes]`
    per_text: bool = False
    image: tuple[int, int, int] | None = None

    def random_images(self, batch: int) -> torch.Tensor:
        """Noise from a seed, ``[batch, *image]``."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, *(self.image or ()))
        return torch.randn(shape, generator=generator).to(self.dtype)

    @property
    def past_names(self) -> list[str]:
        """The cache inputs, keys and values in turn."""
        return [f"past_key_values.{s.layer}.{part}" for s in self.cache for part, _ in s.parts]

    @property
    def present_names(self) -> list[str]:
        """The cache outputs, in the order of :attr:`past_names`."""
        return [f"present.{s.layer}.{part}" for s in self.cache for part, _ in s.parts]

    @property
    def input_names(self) -> list[str]:
        """All inputs, in order."""
        return [*self.token_inputs, *self.past_names]

    @property
    def output_names(self) -> list[str]:
        """All outputs, in order."""
        return [self.main_output, *self.present_names]

    def random_past(self, batch: int, length: int) -> list[torch.Tensor]:
        """Keys and values in turn, ``[batch, heads, length, size]``, normally distributed."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(batch, s.heads, length, size, generator=generator).to(self.dtype)
            for s in self.cache
            for _, size in s.parts
        ]


class InterfaceModule(torch.nn.Module):
    """A model behind plain tensors: the cache goes in and comes out as a flat list."""

    def __init__(self, model: PreTrainedModel, interface: OnnxInterface) -> None:
        super().__init__()
        self.model = model
        self.interface = interface

    def forward(
        self, tokens: dict[str, torch.Tensor], past: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor]:
        """Runs one step."""
        if not self.interface.cache:
            output = self.model(**tokens)
            return [getattr(output, self.interface.main_output)]
        cache = new_cache()
        for layer in self.interface.length_keepers if past else ():
            length = past[0].new_zeros(past[0].shape[0], 1, past[0].shape[2], 1)
            cache.update(length, length, layer)
        for slot, key, value in zip(self.interface.cache, past[::2], past[1::2], strict=True):
            cache.update(key, value, slot.layer)
        output = self.model(**tokens, **{self.interface.cache_argument: cache}, use_cache=True)
        layers = [cache.layers[slot.layer] for slot in self.interface.cache]
        present = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return [getattr(output, self.interface.main_output), *present]


def interface_of(model: PreTrainedModel) -> OnnxInterface:
    """Finds a model's interface by running it once on three tokens."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ExportError(
            f"{name} is an encoder-decoder model; PyTorch's exporter is not set up for those here.",
            "Export it with optimum-cli, and cut each graph: depthcut prune.",
            code="encoder-decoder",
        )
    if model.main_input_name == PIXELS:
        return _of_images(model)
    parameters = inspect.signature(model.forward).parameters
    cache = new_cache() if model.can_generate() else None
    argument = cache_argument(model)
    arguments = {} if cache is None else {argument: cache, "use_cache": True}
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long)
    try:
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    # Any model's own code runs here.
    except Exception as error:
        pass_on_memory_error(error)
        what = "token ids" if cache is None else "token ids with a cache of plain keys and values"
        raise ExportError(
            f"{name} can't run on {what}: {first_line(error)}.", code="no-plain-cache"
        ) from error
    structure = structure_of(model.config)
    gone = set() if structure is None else structure.without_cache
    return OnnxInterface(
        token_inputs=_token_inputs(model, set(parameters), with_cache=cache is not None),
        cache=() if cache is None else _slots(cache, name, gone),
        main_output="logits" if hasattr(output, "logits") else "last_hidden_state",
        cache_argument=argument,
        dtype=model.dtype,
        length_keepers=() if structure is None else tuple(structure.length_keepers),
        per_text=hasattr(output, "logits") and output.logits.dim() == 2,
    )


def _of_images(model: PreTrainedModel) -> OnnxInterface:
    classifies = type(model).__name__.endswith(OF_IMAGES)
    return OnnxInterface(
        token_inputs=(PIXELS,),
        cache=(),
        main_output="logits" if classifies else "last_hidden_state",
        cache_argument="",
        dtype=model.dtype,
        per_text=classifies,
        image=image_shape(model.config.to_dict()),
    )


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model takes its cache; transformers 5.24 renamed it."""
    renamed = "cache" in inspect.signature(model.forward).parameters
    return "cache" if renamed else "past_key_values"


def new_cache() -> Any:
    """An empty cache that grows by concatenation, whatever the config says of sliding windows."""
    from transformers import DynamicCache

    return DynamicCache()


def _token_inputs(
    model: PreTrainedModel, parameters: set[str], *, with_cache: bool
) -> tuple[str, ...]:
    names = ["input_ids", "attention_mask"]
    # Without a cache the positions are the model's own business.
    if with_cache and "position_ids" in parameters:
        names.append("position_ids")
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    if not with_cache and has_types and "token_type_ids" in parameters:
        names.append("token_type_ids")
    return tuple(names)


def _slots(cache: Any, name: str, gone: set[int]) -> tuple[CacheSlot, ...]:
    slots = []
    for layer, kept in enumerate(cache.layers):
        if layer in gone:
            continue
        keys, values = getattr(kept, "keys", None), getattr(kept, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] != _PROBE_TOKENS:
            raise ExportError(
                f"{name} keeps something other than keys and values of every token in layer "
                f"{layer}.",
                "Models with recurrent or convolutional states can't be exported here yet.",
            )
        slots.append(CacheSlot(layer, keys.shape[1], keys.shape[3], values.shape[3]))
    if not slots:
        raise ExportError(f"{name} generates text but filled no cache.")
    return tuple(slots)
