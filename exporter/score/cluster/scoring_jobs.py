"""The pieces that scoring is cut into, and what a worker does with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from exporter.errors import ScoringError
from exporter.models.ablation import Damage
from exporter.models.ablation.ratios import Floats
from exporter.models.anatomy.architectures import layer_modules
from exporter.models.texts.calibration import CalibrationText
from exporter.score.answer_pass import answer_meter
from exporter.score.cluster.loading import ModelAddress
from exporter.score.cluster.meter import CutJob, measured
from exporter.score.cosine import COSINE
from exporter.score.gradient_pass import gradient_sums
from exporter.score.metric import GradientMetric, Metric, StreamMetric
from exporter.score.registry import metrics_named
from exporter.score.stream_pass import stream_batch
from exporter.score.subject import Subject

_M = TypeVar("_M")


@dataclass(frozen=True)
class Recipe:
    """What a worker sets up to score.

    Attributes:
        model: What it loads.
        text: The samples.
        metrics: Names of what is scored by.
        batch_size: Samples in one forward pass.
        positions: Answers are compared at every so many positions.
    """

    model: ModelAddress
    text: CalibrationText
    metrics: tuple[str, ...]
    batch_size: int
    positions: int

    def begin(self) -> Scorer:
        """Loads the model, in the worker."""
        model = self.model.load().model
        subject = Subject(
            model,
            layer_modules(model),
            self.text,
            batch_size=self.batch_size,
            positions=self.positions,
        )
        return Scorer(subject, metrics_named(self.metrics))


@dataclass(frozen=True)
class StreamJob:
    """One batch's pass for the metrics of the residual stream.

    Attributes:
        start: Its first sample.
    """

    start: int

    def __str__(self) -> str:
        return f"the residual stream of the samples from {self.start} on"


@dataclass(frozen=True)
class GradientJob:
    """One sample's gradients.

    Attributes:
        sample: Its number.
    """

    sample: int

    def __str__(self) -> str:
        return f"the gradients of sample {self.sample}"


Job = StreamJob | GradientJob | CutJob


class Scorer:
    """A worker's model, and what it is scored by.

    Args:
        subject: The model with the text.
        metrics: What is collected.
    """

    def __init__(self, subject: Subject, metrics: Sequence[Metric]) -> None:
        self._subject = subject
        self._of_stream = of_sort(metrics, StreamMetric)
        self._of_gradients = of_sort(metrics, GradientMetric)

    def do(self, job: Job) -> tuple[Floats, Floats] | Floats | list[Damage]:
        """Does one piece.

        Returns:
            Of a stream its sums ``[metrics, layers, units, batch]`` and counts ``[batch]``; of
            gradients ``[metrics, layers, units]``; of cuts their damages.

        Raises:
            ScoringError: Something is not finite.
        """
        if isinstance(job, StreamJob):
            batch = stream_batch(self._subject, self._of_stream, job.start)
            return batch.sums, batch.counts
        size = self._subject.batch_size
        try:
            if isinstance(job, GradientJob):
                return gradient_sums(self._subject, self._of_gradients, job.sample)
            return measured(answer_meter(self._subject), job)
        except ScoringError:
            # Where logits or gradients are not finite, the stream tells where that began.
            first = job.sample // size * size if isinstance(job, GradientJob) else job.start
            stream_batch(self._subject, [COSINE], first)
            raise


def work(scorer: Scorer, job: Job) -> Any:
    """Does one piece, in the worker."""
    return scorer.do(job)


def of_sort(metrics: Sequence[Metric], sort: type[_M]) -> list[_M]:
    """The metrics that are collected in one way."""
    return [metric for metric in metrics if isinstance(metric, sort)]
