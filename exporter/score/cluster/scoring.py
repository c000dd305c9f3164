"""Scores a model on several workers: batches of the text are spread, their sums come back."""

from __future__ import annotations

import gc
import itertools
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporter.artifacts import ImportanceReport, ModelRef, Score
from exporter.artifacts.stacks import Stacks
from exporter.errors import ClusterError, ModelSourceError, ScoringError
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.ablation.damage import D, Damage, Floats, joined
from exporter.models.architectures import layer_modules
from exporter.models.loading.model_source import TOO_LARGE, LoadedModel, load_model
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import in_couples
from exporter.progress import QUIET, Progress
from exporter.score.cluster.pool import Pool
from exporter.score.metric import AnswerMetric, Metric, OrderMetric, StreamMetric, of_kind
from exporter.score.options import ScoreOptions
from exporter.score.passes import (
    ScoredModel,
    StreamSums,
    answer_meter,
    answer_units,
    refuse_not_finite,
    scores_of_damages,
    stream_sums,
)
from exporter.score.registry import metrics_named
from exporter.score.scoring import order_scores, report_of, scored_model
from graph_passes.types import DeletionKind, SublayerRef


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
    scoring = _prepared(source, wanted, how, progress)
    gc.collect()  # the model's modules refer to each other
    return scoring.report(pool, progress)


def _prepared(
    source: str, options: ScoreOptions, load: dict[str, Any], progress: Progress
) -> _Scoring:
    with progress.task(f"load {source} here, to make the text"):
        loaded = load_model(source, **load)
    scored = scored_model(loaded, options, progress=progress)
    metrics = metrics_named(options.metrics)
    names = tuple(metric.name for metric in metrics)
    setup = ScoringSetup(
        *_address(loaded), load, scored.text, names, options.batch_size, options.kl_positions
    )
    starts = [batch.first_sample for batch in scored.batches]
    orders = order_scores(scored, of_kind(metrics, OrderMetric))
    return _Scoring(loaded.ref, setup, metrics, len(scored.layers), scored.blocks, starts, orders)


@dataclass(frozen=True)
class _Scoring:
    """What is to be scored; it keeps nothing of the model that the text was made with."""

    model: ModelRef
    setup: ScoringSetup
    metrics: list[Metric]
    num_layers: int
    blocks: bool
    starts: list[int]
    orders: dict[str, list[Score]]

    def report(self, pool: Pool, progress: Progress) -> ImportanceReport:
        """Does all pieces on the workers, and adds them up."""
        units = answer_units(self.num_layers, blocks=self.blocks)
        pieces = self._pieces(pool.workers, units)
        results: dict[int, Any] = {}
        with progress.task("score on the cluster", total=len(pieces), unit="jobs") as task:
            for number, result in pool.run(self.setup.begin, work, pieces):
                results[number] = result
                task.advance()

        def of(kind: Kind) -> list[tuple[Piece, Any]]:
            numbered = enumerate(pieces)
            return [(piece, results[n]) for n, piece in numbered if piece.kind == kind]

        scores = dict(self.orders)
        if of_stream := of_kind(self.metrics, StreamMetric):
            totals = StreamSums(self.num_layers, of_stream)
            for _, result in of("stream"):
                totals.add(*result)
            scores |= totals.scores()
        if of_answers := of_kind(self.metrics, AnswerMetric):
            damages = joined_damages(*zip(*of("cuts"), strict=True))
            scores |= scores_of_damages(of_answers, units, damages)
        return report_of(self.model, self.setup.text.part, self.metrics, scores)

    def _pieces(self, workers: int, units: Sequence[Unit]) -> list[Piece]:
        """Long pieces first: a short one at the end keeps fewer workers waiting."""
        pieces: list[Piece] = []
        if of_kind(self.metrics, AnswerMetric):
            others = [tuple(Stacks(self.num_layers).every([unit])) for unit in units]
            pieces += cut_pieces(self.starts, workers, others)
        if of_kind(self.metrics, StreamMetric):
            pieces += (Piece("stream", start) for start in self.starts)
        return pieces


def _address(loaded: LoadedModel) -> tuple[str, str]:
    """What a worker loads, and its hash."""
    source = loaded.ref.source
    here = Path(source).expanduser().exists()
    return str(loaded.path.resolve()) if here else source, loaded.ref.sha256


@dataclass(frozen=True)
class ScoringSetup:
    """What a worker sets up to score."""

    source: str
    sha256: str
    load: Mapping[str, Any]
    text: CalibrationText
    metrics: tuple[str, ...]
    batch_size: int
    positions: int

    def begin(self) -> tuple[ScoredModel, list[Metric]]:
        """Loads the model, in the worker."""
        model, size = self._loaded().model, self.batch_size
        layers = layer_modules(model)
        scored = ScoredModel(model, layers, self.text, size, positions=self.positions)
        return scored, metrics_named(self.metrics)

    def _loaded(self) -> LoadedModel:
        host = socket.gethostname()
        try:
            loaded = load_model(self.source, **self.load)
        except ModelSourceError as error:
            if error.code == TOO_LARGE:
                raise
            raise ClusterError(
                f"On {host}: {error.message}",
                "The model has to lie under the same path on all machines, such as a shared "
                "folder, or be a hub id that all can fetch.",
                code="another-model",
            ) from error
        if loaded.ref.sha256 != self.sha256:
            raise ClusterError(
                f"On {host}, {self.source} is another model (sha256 {loaded.ref.sha256[:12]}) "
                f"than where the command was given (sha256 {self.sha256[:12]}).",
                "Give all machines the same files.",
                code="another-model",
            )
        return loaded


_FEWEST_CUTS = 4
"""So few share a run of the whole model; fewer would mostly run that."""

Names = tuple[SublayerRef, ...]
Unit = tuple[int, DeletionKind]
Kind = Literal["stream", "cuts"]


@dataclass(frozen=True)
class Piece:
    """A batch's pass over the stream, or some cuts on a batch."""

    kind: Kind
    first: int  # sample
    cuts: tuple[Names, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} of the samples from {self.first} on"


def work(
    state: tuple[ScoredModel, list[Metric]], piece: Piece
) -> tuple[Floats, Floats] | list[Damage]:
    """Does one piece, in the worker.

    Of a stream its sums ``[metrics, layers, units, batch]`` and counts ``[batch]``; of
    cuts their damages.
    """
    scored, metrics = state
    batch = scored.batches[piece.first // in_couples(scored.batch_size, scored.text.types)]
    if piece.kind == "stream":
        return stream_sums(scored, of_kind(metrics, StreamMetric), batch)
    try:
        cuts = [dict.fromkeys(names, NOTHING) for names in piece.cuts]
        return list(answer_meter(scored).measure_batch(piece.first, {}, cuts))[1:]
    except ScoringError:
        refuse_not_finite(scored, [batch])
        raise


def cut_pieces(starts: Sequence[int], workers: int, cuts: Sequence[Names]) -> list[Piece]:
    """The pieces, in the order of the text: as few as keep all workers busy to the end."""
    wanted = workers // math.gcd(len(starts), workers)
    parts = max(1, min(wanted, len(cuts) // _FEWEST_CUTS))
    bounds = [len(cuts) * part // parts for part in range(parts + 1)]
    return [
        Piece("cuts", start, tuple(cuts[first:end]))
        for start in starts
        for first, end in itertools.pairwise(bounds)
    ]


def joined_damages(pieces: Sequence[Piece], results: Sequence[Sequence[D]]) -> list[D]:
    """Of each cut over all samples."""
    parts: dict[int, list[D]] = {}
    for piece, damages in zip(pieces, results, strict=True):
        parts.setdefault(piece.first, []).extend(damages)
    return [joined(list(damages)) for damages in zip(*parts.values(), strict=True)]
