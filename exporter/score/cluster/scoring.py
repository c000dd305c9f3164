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

from exporter.artifacts import ImportanceReport
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
    ScoredStack,
    StreamSums,
    answer_meter,
    answer_units,
    refuse_not_finite,
    scores_of_damages,
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
    with progress.task(f"load {source} here, to make the text"):
        loaded = load_model(source, **how)
    scored = scored_model(loaded, wanted, progress=progress)
    metrics, ref, layers = metrics_named(wanted.metrics), loaded.ref, len(scored.layers)
    of_stream, of_answers = of_kind(metrics, StreamMetric), of_kind(metrics, AnswerMetric)
    scores = order_scores(scored, of_kind(metrics, OrderMetric))
    units = answer_units(layers, blocks=scored.blocks)
    starts = [batch.first_sample for batch in scored.batches]
    here = Path(ref.source).expanduser().exists()
    setup = ScoringSetup(
        str(loaded.path.resolve()) if here else ref.source,
        ref.sha256,
        how,
        scored.text,
        tuple(metric.name for metric in metrics),
        wanted.batch_size,
        wanted.kl_positions,
    )
    del loaded, scored
    gc.collect()  # the model's modules refer to each other

    # Long pieces first: a short one at the end keeps fewer workers waiting.
    every = [tuple(Stacks(layers).every([unit])) for unit in units]
    cuts = cut_pieces(starts, pool.workers, every) if of_answers else []
    pieces = [*cuts, *(Piece("stream", start) for start in (starts if of_stream else ()))]
    results: list[Any] = [None] * len(pieces)
    with progress.task("score on the cluster", total=len(pieces), unit="jobs") as task:
        for number, result in pool.run(setup.begin, work, pieces):
            results[number] = result
            task.advance()
    if of_stream:
        totals = StreamSums(ScoredStack(range(layers)), of_stream)
        for sums in results[len(cuts) :]:
            totals.add(*sums)
        scores |= totals.scores()
    if of_answers:
        damages = joined_damages(cuts, results[: len(cuts)])
        scores |= scores_of_damages(of_answers, units, damages)
    return report_of(ref, setup.text.part, metrics, scores)


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


@dataclass(frozen=True)
class Piece:
    """A batch's pass over the stream, or some cuts on a batch."""

    kind: Literal["stream", "cuts"]
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
        return stream_sums(scored, of_kind(metrics, StreamMetric), batch)[0]
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
