"""The residual stream between a model's layers, and how like each other two places of it are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.architectures import layer_modules
from exporter.models.residual_stream import LayerStates, run_backbone, tapped
from exporter.models.texts.batches import batches_of
from tests.benchmarks.rivals.candidate import WHOLE, Candidate

if TYPE_CHECKING:
    import torch

    from exporter.models.texts.calibration import CalibrationText

BATCH = 2


def layer_states(
    model: Any, text: CalibrationText, candidate: Candidate = WHOLE
) -> Iterator[list[LayerStates]]:
    """The states of all layers, a list for each batch of a text without padding."""
    layers = layer_modules(model)
    for batch in batches_of(text.input_ids, text.mask, BATCH):
        found: list[LayerStates] = []
        with candidate.applied(model), tapped(layers, found.append):
            run_backbone(model, batch.inputs(model.device))
        yield found


def between_layers(states: list[LayerStates]) -> list[torch.Tensor]:
    """The stream before each layer and behind the last, ``[batch, tokens, hidden]`` each."""
    return [*(each.entering for each in states), states[-1].output]


def span_distances(
    model: Any, text: CalibrationText, span: int = 1, candidate: Candidate = WHOLE
) -> NDArray[np.float64]:
    """How far each span of layers turns the stream: the mean of ``1 - cos`` over tokens."""
    import torch

    sums, tokens = np.zeros(()), 0
    for states in layer_states(model, text, candidate):
        stream = [each.double() for each in between_layers(states)]
        pairs = zip(stream, stream[span:], strict=False)
        found = [(1 - torch.cosine_similarity(x, y, dim=-1)).sum().item() for x, y in pairs]
        sums, tokens = sums + np.array(found), tokens + stream[0][..., 0].numel()
    return np.asarray(sums / tokens, np.float64)


def least_turning_span(model: Any, text: CalibrationText, span: int, *, last: bool = True) -> int:
    """The first layer of the span that turns the stream least."""
    distances = span_distances(model, text, span)
    return 1 + int(distances[1 : None if last else -1].argmin())
