"""What a metric is: its name, what it needs, and what it makes its scores from.

A lower score means more redundant, whatever the metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graph_passes.types import DeletionKind

if TYPE_CHECKING:
    import torch

    from exporter.models.ablation import Damage
    from exporter.score.change import Change

UNITS: tuple[DeletionKind, ...] = ("attention", "mlp", "block")
"""What of each layer is scored, in the reports' order."""


@dataclass(frozen=True)
class StreamMetric:
    """Compares the residual stream before and after a sublayer; all of them share one pass.

    Attributes:
        name: What users call it.
        of: The distance at every token, ``[batch, tokens]``, float64.
        last_token: Only the last real token of each sample counts.
    """

    name: str
    of: Callable[[Change], torch.Tensor]
    last_token: bool = False


@dataclass(frozen=True)
class AnswerMetric:
    """Compares the model's answers with and without a sublayer; all of them share the runs.

    Attributes:
        name: What users call it.
        value: The score.
        std_error: Its standard error over samples; None with fewer than two.
    """

    name: str
    value: Callable[[Damage], float]
    std_error: Callable[[Damage], float | None]


@dataclass(frozen=True)
class GradientMetric:
    """Follows gradients from the loss back to each sublayer.

    Attributes:
        name: What users call it.
        of: From a branch's output and the loss's gradient there, both ``[batch, tokens, hidden]``,
            to a value at every token, ``[batch, tokens]``.
    """

    name: str
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FixedMetric:
    """Looks at neither text nor weights: what the others are held against.

    Attributes:
        name: What users call it.
        values: From the number of layers and a seed to ``values[layer][unit]``, in the order of
            :data:`UNITS`.
    """

    name: str
    values: Callable[[int, int], list[list[float]]]


Metric = StreamMetric | AnswerMetric | GradientMetric | FixedMetric
