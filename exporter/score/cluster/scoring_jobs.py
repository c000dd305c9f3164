"""The pieces that scoring is cut into, and what a worker does with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.errors import ScoringError
from exporter.models.ablation.damage import Damage
from exporter.models.ablation.ratios import Floats
from exporter.models.anatomy.architectures import layer_modules
from exporter.models.texts.calibration import CalibrationText
from exporter.score.answer_pass import answer_meter
from exporter.score.cluster.loading import ModelAddress
from exporter.score.cluster.meter import CutJob, measured
from exporter.score.gradient_pass import gradient_sums
from exporter.score.metric import GradientMetric, Metric, StreamMetric, of_kind
from exporter.score.registry import metrics_named
from exporter.score.scored_model import ScoredModel
from exporter.score.stream_pass import refuse_not_finite, stream_sums


@dataclass(frozen=True)
class ScoringSetup:
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

    def begin(self) -> ScoringWorker:
        """Loads the model, in the worker."""
        model = self.model.load().model
        scored = ScoredModel(
            model,
            layer_modules(model),
            self.text,
            batch_size=self.batch_size,
            positions=self.positions,
        )
        return ScoringWorker(scored, metrics_named(self.metrics))


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


ScoringJob = StreamJob | GradientJob | CutJob


class ScoringWorker:
    """A worker's model, and what it is scored by.

    Args:
        scored: The model with the text.
        metrics: What is collected.
    """

    def __init__(self, scored: ScoredModel, metrics: Sequence[Metric]) -> None:
        self._scored = scored
        self._of_stream = of_kind(metrics, StreamMetric)
        self._of_gradients = of_kind(metrics, GradientMetric)

    def do(self, job: ScoringJob) -> tuple[Floats, Floats] | Floats | list[Damage]:
        """Does one piece.

        Returns:
            Of a stream its sums ``[metrics, layers, units, batch]`` and counts ``[batch]``; of
            gradients ``[metrics, layers, units]``; of cuts their damages.

        Raises:
            ScoringError: Something is not finite.
        """
        scored = self._scored
        first = job.sample if isinstance(job, GradientJob) else job.start
        batch = scored.batches[first // scored.batch_size]
        if isinstance(job, StreamJob):
            return stream_sums(scored, self._of_stream, batch)
        try:
            if isinstance(job, GradientJob):
                return gradient_sums(scored, self._of_gradients, job.sample)
            return measured(answer_meter(scored), job)
        except ScoringError:
            refuse_not_finite(scored, [batch])
            raise


def work(worker: ScoringWorker, job: ScoringJob) -> Any:
    """Does one piece, in the worker."""
    return worker.do(job)
