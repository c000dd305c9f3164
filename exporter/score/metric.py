"""What a metric is: its name, what it needs, and what it makes its scores from.

A lower score means more redundant, whatever the metric. Importing this costs nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    import torch
    from numpy.random import Generator

    from exporter.models.ablation.damage import Damage
    from exporter.score.similarity import Change
    from graph_passes.types import DeletionKind

UNITS: tuple[DeletionKind, ...] = ("attention", "mlp", "block")
"""What of each layer is scored, in the reports' order."""

_M = TypeVar("_M", bound="Metric")


@dataclass(frozen=True)
class Metric:
    """One of four kinds, by how its scores are made.

    Attributes:
        name: What users call it.
        reads_text: Whether it wants a text at all.
        needs_head: Whether it judges predictions of the next token.
        needs_gradients: Whether it follows gradients, which takes the whole model in memory.
    """

    name: str
    reads_text: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False


@dataclass(frozen=True)
class StreamMetric(Metric):
    """Compares the residual stream before and after a sublayer; all of them share one pass.

    Attributes:
        of: The distance at every token, ``[batch, tokens]``, float64.
        over: What the score is: ``all``: the mean over the text's tokens; ``last``: the mean over
            samples of each one's last token; ``largest``: that of each one's largest value.
    """

    of: Callable[[Change], torch.Tensor]
    over: Literal["all", "last", "largest"] = "all"


@dataclass(frozen=True)
class AnswerMetric(Metric):
    """Compares the model's answers with and without a sublayer; all of them share the runs.

    Attributes:
        of: The score, and its standard error over samples: None with fewer than two.
    """

    needs_head = True
    of: Callable[[Damage], tuple[float, float | None]]


@dataclass(frozen=True)
class GradientMetric(Metric):
    """Follows gradients from the loss back to each sublayer.

    Attributes:
        of: From a branch's output and the loss's gradient there, both ``[batch, tokens, hidden]``,
            to a value at every token, ``[batch, tokens]``.
    """

    needs_head = needs_gradients = True
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class OrderMetric(Metric):
    """Looks at neither text nor weights: what the others are held against.

    Attributes:
        of: From the numbers of layers and of units, and what draws by chance, to
            ``values[layer][unit]``.
    """

    reads_text = False
    of: Callable[[int, int, Generator], list[list[float]]]


def of_kind(metrics: Iterable[Metric], kind: type[_M]) -> list[_M]:
    """The metrics among some that are collected in one way."""
    return [metric for metric in metrics if isinstance(metric, kind)]
