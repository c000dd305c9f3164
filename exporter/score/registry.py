"""All metrics by name, and what each asks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from exporter.errors import ScoringError, UsageError
from exporter.score.angular import ANGULAR, ANGULAR_LAST
from exporter.score.cosine import COSINE
from exporter.score.depth import DEPTH
from exporter.score.gradient_pass import refuse_without_gradients
from exporter.score.kl import KL
from exporter.score.metric import AnswerMetric, FixedMetric, GradientMetric, Metric
from exporter.score.perplexity import PERPLEXITY
from exporter.score.random_order import RANDOM
from exporter.score.relative_l2 import RELATIVE_L2
from exporter.score.relative_magnitude import RELATIVE_MAGNITUDE
from exporter.score.taylor import TAYLOR

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        COSINE, ANGULAR, ANGULAR_LAST, RELATIVE_L2, RELATIVE_MAGNITUDE,
        KL, PERPLEXITY, TAYLOR, RANDOM, DEPTH,
    )
}  # fmt: skip
"""By the names that users call them; the first is what a report has unless asked otherwise."""

DEFAULT = COSINE.name


def metrics_named(names: Iterable[str]) -> list[Metric]:
    """The metrics of some names, each once, in their order.

    Raises:
        UsageError: A name is not known, or there is none.
    """
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in METRICS]
    if unknown or not wanted:
        what = f"There is no metric {unknown[0]!r}." if unknown else "No metric is named."
        raise UsageError(what, f"Metrics are {', '.join(METRICS)}.")
    return [METRICS[name] for name in wanted]


def refuse_unfit(model: Any, metrics: Iterable[Metric]) -> None:
    """Refuses metrics that a model can't be scored by.

    Raises:
        ScoringError: A metric wants a language head or gradients, and the model gives none.
    """
    for metric in metrics:
        if isinstance(metric, AnswerMetric | GradientMetric):
            _refuse_without_head(model, metric.name)
        if isinstance(metric, GradientMetric):
            refuse_without_gradients(model, metric.name)


def reads_text(metrics: Iterable[Metric]) -> bool:
    """Whether any of them wants a text at all."""
    return not all(isinstance(metric, FixedMetric) for metric in metrics)


def _refuse_without_head(model: Any, name: str) -> None:
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ScoringError(
            f"{name} judges predictions of the next token, and {type(model).__name__} makes none.",
            "Take a metric of the residual stream, such as cosine.",
        )
