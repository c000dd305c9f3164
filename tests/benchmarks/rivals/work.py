"""What every method is given and gives: one model and text, its stream, and the cut model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.models.ablation.branch_replacements import (
    BranchReplacement,
    branches_replaced,
    without_branches,
)
from exporter.models.architectures import layer_modules
from exporter.models.changed_weights import change_weights
from exporter.models.residual_stream import LayerStates, hooked, run_backbone, tapped
from exporter.models.texts.samples import batches_of
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch

    from exporter.choose.budgets.limits import Meter
    from exporter.models.loading.model_source import LoadedModel
    from exporter.models.texts.calibration import CalibrationText
    from exporter.progress import Progress


@dataclass(frozen=True, eq=False)
class Workplace:
    """One model and one text for all."""

    loaded: LoadedModel
    source: str
    text: CalibrationText
    few: CalibrationText
    meter: Meter
    searched: int  # samples that the meter reads
    keep: Path
    distill_tokens: int
    progress: Progress

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.loaded.model

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        return self.loaded.ref.num_layers


@dataclass(frozen=True, eq=False)
class Patch:
    """What the stream goes through somewhere."""

    factor: torch.Tensor
    shift: torch.Tensor | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it takes time; a number can be folded into the weights before."""
        return self.factor.ndim > 0

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        """The stream behind it, ``[..., hidden]``."""
        factor = self.factor.to(stream)
        result = stream @ factor if self.is_matrix else stream * factor
        return result if self.shift is None else result + self.shift.to(stream)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cut model."""

    cut: Mapping[SublayerRef, BranchReplacement] = field(default_factory=dict)
    patches: Mapping[int, Patch] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    read: tuple[int, ...] = ()  # samples of the calibration text: to choose, to fit, to stop

    @classmethod
    def without_blocks(cls, model: Any, layers: Iterable[int], **more: Any) -> Candidate:
        """A model without some whole blocks."""
        return cls(without_branches([(layer, "block") for layer in layers], model), **more)

    @contextlib.contextmanager
    def within(self, model: Any) -> Iterator[None]:
        """Gives a model all but the cut itself while the block runs."""
        parameters = dict(model.named_parameters())
        old = {name: parameters[name].data for name in self.weights}
        try:
            for name, value in self.weights.items():
                parameters[name].data = value
            with hooked(self.patched(model)):
                yield
        finally:
            for name, value in old.items():
                parameters[name].data = value

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Makes a model this candidate while the block runs."""
        with self.within(model), branches_replaced(model, self.cut):
            yield

    def patched(self, model: Any) -> Iterator[Any]:
        """Registers the hooks that patch the stream."""
        layers = layer_modules(model)
        for number, patch in self.patches.items():
            yield layers[number].layer.register_forward_pre_hook(_through(patch))


WHOLE = Candidate()
"""The model as it is."""


def new_values(model: Any, changes: Mapping[str, ChangedWeight]) -> dict[str, torch.Tensor]:
    """The values that changed weights would have; the model keeps its own."""
    parameters = dict(model.named_parameters())
    old = {name: parameters[name].data for name in changes}
    try:
        change_weights(model, changes)
        return {name: parameters[name].data for name in changes}
    finally:
        for name, value in old.items():
            parameters[name].data = value


def _through(patch: Patch) -> Any:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> Any:
        return (patch(inputs[0]), *inputs[1:])

    return hook


BATCH = 2


def layer_states(
    model: Any, text: CalibrationText, candidate: Candidate = WHOLE
) -> Iterator[list[LayerStates]]:
    """The states of all layers, a list for each batch of a text without padding."""
    layers = layer_modules(model)
    for batch in batches_of(text.input_ids, text.mask, BATCH):
        states: list[LayerStates] = []
        with candidate.applied(model), tapped(layers, states.append):
            run_backbone(model, batch.inputs(model.device))
        yield states


def between_layers(states: list[LayerStates]) -> list[torch.Tensor]:
    """The stream before each layer and behind the last, ``[batch, tokens, hidden]`` each."""
    return [*(item.entering for item in states), states[-1].output]


def span_distances(
    model: Any, text: CalibrationText, span: int = 1, candidate: Candidate = WHOLE
) -> NDArray[np.float64]:
    """How far each span of layers turns the stream: the mean of ``1 - cos`` over tokens."""
    import torch

    sums, tokens = np.zeros(()), 0
    for states in layer_states(model, text, candidate):
        stream = [tensor.double() for tensor in between_layers(states)]
        pairs = zip(stream, stream[span:], strict=False)
        result = [(1 - torch.cosine_similarity(x, y, dim=-1)).sum().item() for x, y in pairs]
        sums, tokens = sums + np.array(result), tokens + stream[0][..., 0].numel()
    return np.asarray(sums / tokens, np.float64)


def least_turning_span(model: Any, text: CalibrationText, span: int, *, last: bool = True) -> int:
    """The first layer of the span that turns the stream least."""
    distances = span_distances(model, text, span)
    return 1 + int(distances[1 : None if last else -1].argmin())
