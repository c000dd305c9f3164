"""The metrics: the one list of their names. Importing it costs nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from exporter.errors import UsageError
from exporter.score import metric as formulas
from exporter.score.metric import AnswerMetric, Metric, OrderMetric, StreamMetric

if TYPE_CHECKING:
    from numpy.random import Generator


def _random(layers: int, units: int, generator: Generator) -> list[list[float]]:
    """By chance, uniform between 0 and 1: what every other metric has to beat.

    The same seed and number of layers give the same scores; there is no standard error.

    Source: the random baseline of arXiv 2406.15786v6 (Mistral-7B, 4, 8 and 12 attentions: 61.5,
    49.6, 39.4 against the cosine's 67.0, 66.9, 64.8). Score with several seeds to see the spread.
    """
    values: list[list[float]] = generator.random((layers, units)).tolist()
    return values


def _depth(layers: int, units: int, _generator: Generator) -> list[list[float]]:
    """Layers above this one: the last layer, at 0, goes first.

    Source: arXiv 2407.15516 (deepest attentions first, no metric); a baseline in arXiv 2406.15786v6
    (Mistral-7B, 4, 8 and 12 attentions: 66.9, 66.9, 61.5 against the cosine's 67.0, 66.9, 64.8).
    Where this differs: the last layer is not spared.
    """
    return [[float(layers - 1 - layer)] * units for layer in range(layers)]


_ALL: tuple[Metric, ...] = (
    StreamMetric("cosine", formulas.cosine),
    StreamMetric("angular", formulas.angular),
    StreamMetric("angular-last", formulas.angular, over="last"),
    StreamMetric("relative-l2", formulas.relative_l2),
    StreamMetric("relative-magnitude", formulas.relative_magnitude),
    AnswerMetric("kl", formulas.kl),
    AnswerMetric("perplexity", formulas.perplexity),
    OrderMetric("random", _random),
    OrderMetric("depth", _depth),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""By the names that users call them; the first is what a report has unless asked otherwise."""

DEFAULT = _ALL[0].name


def metrics_named(names: Iterable[str]) -> list[Metric]:
    """The metrics of some names, each once, in their order."""
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in METRICS]
    if unknown or not wanted:
        what = f"There is no metric {unknown[0]!r}." if unknown else "No metric is named."
        raise UsageError(what, f"Metrics are {', '.join(METRICS)}.")
    return [METRICS[name] for name in wanted]
