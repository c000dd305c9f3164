"""Scores a model on several workers: batches of the text are spread, their sums come back."""

from __future__ import annotations

import gc
import itertools
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.artifacts import ImportanceReport, ModelRef
from exporter.artifacts.stacks import Stacks
from exporter.errors import ClusterError, ModelSourceError, ScoringError
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.ablation.damage import D, Damage, Floats, joined
from exporter.models.ablation.meter import CutMeter
from exporter.models.architectures import layer_modules
from exporter.models.loading.model_source import TOO_LARGE, LoadedModel, load_model
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import in_couples
from exporter.progress import QUIET, Progress
from exporter.score.cluster.pool import Pool
from exporter.score.metric import (
    AnswerMetric,
    GradientMetric,
    Metric,
    OrderMetric,
    StreamMetric,
    of_kind,
)
from exporter.score.options import ScoreOptions
from exporter.score.passes import (
    ScoredModel,
    StreamSums,
    answer_meter,
    answer_units,
    gradient_sums,
    refuse_not_finite,
    refuse_without_targets,
    scores_of_damages,
    scores_of_gradients,
    stream_sums,
)
from exporter.score.registry import metrics_named
from exporter.score.scoring import order_scores, report_of, scored_model
from graph_passes.types import SublayerRef


def score_on_cluster(
    source: str,
    pool: Pool,
    options: ScoreOptions | None = None,
    *,
    load: Mapping[str, Any] | None = None,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model as :func:`exporter.score.score` does, on the workers of a pool.

    The text is made here, and the model's layout is checked here; the copy that this takes is let
    go before the workers load theirs.
    """
    wanted, how = options or ScoreOptions(), dict(load or {})

    def prepared() -> _Scoring:
        with progress.task(f"load {source} here, to make the text"):
            loaded = load_model(source, **how)
        scored = scored_model(loaded, wanted, progress=progress)
        names = tuple(dict.fromkeys(wanted.metrics))
        model = ModelAddress.of(loaded, how)
        setup = ScoringSetup(model, scored.text, names, wanted.batch_size, wanted.kl_positions)
        return _Scoring(loaded.ref, setup, scored)

    scoring = prepared()
    gc.collect()  # the model's modules refer to each other
    return scoring.report(pool, progress)


class _Scoring:
    """What is to be scored; it keeps nothing of the model that the text was made with."""

    def __init__(self, model: ModelRef, setup: ScoringSetup, scored: ScoredModel) -> None:
        metrics = metrics_named(setup.metrics)
        self._model, self._setup, self._metrics = model, setup, metrics
        self._num_layers = len(scored.layers)
        self._starts = [batch.first_sample for batch in scored.batches]
        self._units = answer_units(self._num_layers, blocks=scored.blocks)
        self._of_stream = of_kind(metrics, StreamMetric)
        self._of_gradients = of_kind(metrics, GradientMetric)
        self._of_answers = of_kind(metrics, AnswerMetric)
        self._found = order_scores(scored, of_kind(metrics, OrderMetric))
        if self._of_gradients:
            refuse_without_targets(scored.text)

    def report(self, pool: Pool, progress: Progress) -> ImportanceReport:
        """Does all pieces on the workers, and adds them up."""
        results = self._results(pool, self._jobs(pool.workers), progress)
        scores = dict(self._found)
        if self._of_stream:
            totals = StreamSums(self._num_layers, self._of_stream)
            for job, result in results:
                if isinstance(job, StreamJob):
                    totals.add(*result)
            scores |= totals.scores()
        if self._of_gradients:
            sums = [result for job, result in results if isinstance(job, GradientJob)]
            text = self._setup.text
            scores |= scores_of_gradients(text, self._num_layers, self._of_gradients, sums)
        if self._of_answers:
            cuts = [(job, result) for job, result in results if isinstance(job, CutJob)]
            damages = joined_damages(*zip(*cuts, strict=True))
            scores |= scores_of_damages(self._of_answers, self._units, damages)
        return report_of(self._model, self._setup.text.part, self._metrics, scores)

    def _jobs(self, workers: int) -> list[ScoringJob]:
        """Long pieces first: a short one at the end keeps fewer workers waiting."""
        jobs: list[ScoringJob] = []
        if self._of_answers:
            others = [tuple(Stacks(self._num_layers).every([unit])) for unit in self._units]
            jobs += cut_jobs(self._starts, workers, others)
        if self._of_gradients:
            jobs += map(GradientJob, range(len(self._setup.text.input_ids)))
        if self._of_stream:
            jobs += map(StreamJob, self._starts)
        return jobs

    def _results(
        self, pool: Pool, jobs: Sequence[ScoringJob], progress: Progress
    ) -> list[tuple[ScoringJob, Any]]:
        """Each piece with its result, in the pieces' order."""
        results: dict[int, Any] = {}
        with progress.task("score on the cluster", total=len(jobs), unit="jobs") as task:
            for number, result in pool.run(self._setup.begin, work, jobs):
                results[number] = result
                task.advance()
        return [(job, results[number]) for number, job in enumerate(jobs)]


@dataclass(frozen=True)
class ModelAddress:
    """What a worker loads."""

    source: str
    sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedModel, options: Mapping[str, Any] | None = None) -> ModelAddress:
        """Where a loaded model came from."""
        source = loaded.ref.source
        if Path(source).expanduser().exists():
            source = str(loaded.path.resolve())
        return cls(source, loaded.ref.sha256, dict(options or {}))

    def load(self) -> LoadedModel:
        """Loads it, in the worker."""
        host = socket.gethostname()
        try:
            loaded = load_model(self.source, **self.options)
        except ModelSourceError as error:
            if error.code == TOO_LARGE:
                raise
            raise ClusterError(
                f"On {host}: {error.message}",
                "The model has to lie under the same path on all machines, such as a shared "
                "folder, or be a hub id that all can fetch.",
                code="model-missing",
            ) from error
        if loaded.ref.sha256 != self.sha256:
            raise ClusterError(
                f"On {host}, {self.source} is another model (sha256 {loaded.ref.sha256[:12]}) "
                f"than where the command was given (sha256 {self.sha256[:12]}).",
                "Give all machines the same files.",
                code="another-model",
            )
        return loaded


@dataclass(frozen=True)
class ScoringSetup:
    """What a worker sets up to score."""

    model: ModelAddress
    text: CalibrationText
    metrics: tuple[str, ...]
    batch_size: int
    positions: int

    def begin(self) -> tuple[ScoredModel, list[Metric]]:
        """Loads the model, in the worker."""
        model = self.model.load().model
        layers, size = layer_modules(model), self.batch_size
        scored = ScoredModel(model, layers, self.text, size, positions=self.positions)
        return scored, metrics_named(self.metrics)


_FEWEST_CUTS = 4
"""So few share a run of the whole model; fewer would mostly run that."""

Names = tuple[SublayerRef, ...]


@dataclass(frozen=True)
class CutJob:
    """Some cuts on one batch."""

    start: int
    cuts: tuple[Names, ...]

    def __str__(self) -> str:
        return f"{len(self.cuts)} cuts on the samples from {self.start} on"


@dataclass(frozen=True)
class StreamJob:
    """One batch's pass for the metrics of the residual stream."""

    start: int

    def __str__(self) -> str:
        return f"the residual stream of the samples from {self.start} on"


@dataclass(frozen=True)
class GradientJob:
    """One sample's gradients."""

    sample: int

    def __str__(self) -> str:
        return f"the gradients of sample {self.sample}"


ScoringJob = StreamJob | GradientJob | CutJob


def work(
    state: tuple[ScoredModel, list[Metric]], job: ScoringJob
) -> tuple[Floats, Floats] | Floats | list[Damage]:
    """Does one piece, in the worker.

    Of a stream its sums ``[metrics, layers, units, batch]`` and counts ``[batch]``; of gradients
    ``[metrics, layers, units]``; of cuts their damages.
    """
    scored, metrics = state
    first = job.sample if isinstance(job, GradientJob) else job.start
    batch = scored.batches[first // in_couples(scored.batch_size, scored.text.types)]
    if isinstance(job, StreamJob):
        return stream_sums(scored, of_kind(metrics, StreamMetric), batch)
    try:
        if isinstance(job, GradientJob):
            return gradient_sums(scored, of_kind(metrics, GradientMetric), job.sample)
        return measured(answer_meter(scored), job)
    except ScoringError:
        refuse_not_finite(scored, [batch])
        raise


def cut_jobs(starts: Sequence[int], workers: int, cuts: Sequence[Names]) -> list[CutJob]:
    """The pieces, in the order of the text: as few as keep all workers busy to the end."""
    wanted = workers // math.gcd(len(starts), workers)
    parts = max(1, min(wanted, len(cuts) // _FEWEST_CUTS))
    bounds = [len(cuts) * part // parts for part in range(parts + 1)]
    return [
        CutJob(start, tuple(cuts[first:end]))
        for start in starts
        for first, end in itertools.pairwise(bounds)
    ]


def joined_damages(jobs: Sequence[CutJob], results: Sequence[Sequence[D]]) -> list[D]:
    """Of each cut over all samples."""
    parts: dict[int, list[D]] = {}
    for job, damages in zip(jobs, results, strict=True):
        parts.setdefault(job.start, []).extend(damages)
    return [joined(list(damages)) for damages in zip(*parts.values(), strict=True)]


def measured(meter: CutMeter[D], job: CutJob) -> list[D]:
    """What the cuts of one piece cost; in the worker."""
    cuts = [dict.fromkeys(names, NOTHING) for names in job.cuts]
    return list(meter.measure_batch(job.start, {}, cuts))[1:]
