"""Runs a model over its calibration text and scores every attention, MLP and block.

All metrics of the residual stream share one pass, all metrics of the model's answers the same runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import CalibrationRef, ImportanceReport, MetricScores, ModelRef, Score
from exporter.errors import ScoringError, UnknownArchitectureError
from exporter.files import sha256_bytes
from exporter.models.anatomy.architectures import layer_modules
from exporter.models.anatomy.residual_stream import LayerModules, ProbeVerdict, probe
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText, calibration_text, check_text
from exporter.progress import QUIET, Progress
from exporter.score.answer_pass import answer_scores
from exporter.score.cosine import COSINE
from exporter.score.fixed_pass import fixed_scores
from exporter.score.gradient_pass import gradient_scores
from exporter.score.metric import (
    AnswerMetric,
    FixedMetric,
    GradientMetric,
    Metric,
    StreamMetric,
)
from exporter.score.options import KL_POSITIONS, ScoreOptions
from exporter.score.registry import DEFAULT, metrics_named, reads_text, refuse_unfit
from exporter.score.stream_pass import stream_scores
from exporter.score.subject import Subject


def score(
    loaded: LoadedModel,
    options: ScoreOptions | None = None,
    *,
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model on the text that the user names.

    Args:
        loaded: The model.
        options: By what, and on which text; None: by cosine, on the usual text.
        cache_dir: Where sampled text is kept.
        progress: Told what goes on.

    Raises:
        UsageError: When a metric is not known.
        CalibrationError: When the text is too short, or the tokenizer is not the model's.
        TextSourceError: When the text can't be read.
        ScoringError: When activations are not finite, or a metric needs what the model lacks.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """
    wanted = options or ScoreOptions()
    subject = subject_of(loaded, wanted, cache_dir=cache_dir, progress=progress)
    return _scored(loaded, subject, metrics_named(wanted.metrics))


def subject_of(
    loaded: LoadedModel,
    options: ScoreOptions,
    *,
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> Subject:
    """The model with its text, checked as :func:`score` does before it runs anything long.

    The arguments are :func:`score`'s, and so is what it raises.
    """
    metrics = metrics_named(options.metrics)
    refuse_unfit(loaded.model, metrics)
    layers = _checked_layers(loaded)
    text = NO_TEXT
    if reads_text(metrics):
        text = calibration_text(
            loaded,
            options.calibration,
            samples=options.samples,
            sequence_length=options.sequence_length,
            seed=options.seed,
            cache_dir=cache_dir,
            progress=progress,
        )
    return Subject(
        loaded.model,
        layers,
        text,
        batch_size=options.batch_size,
        seed=options.seed,
        positions=options.kl_positions,
        blocks=options.blocks,
        progress=progress,
    )


def score_on(
    loaded: LoadedModel,
    text: CalibrationText,
    *,
    metrics: Sequence[str] = (DEFAULT,),
    batch_size: int = 4,
    seed: int = 0,
    kl_positions: int = KL_POSITIONS,
    blocks: bool = False,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model on token ids that the caller chose; padding is left out.

    For library users whose text comes from elsewhere, such as a tokenized data set with samples of
    unequal length; :func:`score` makes the samples itself, all of one length.

    Args:
        loaded: The model.
        text: The samples, their mask, and what the report shall say about them.
        metrics: As in :class:`ScoreOptions`, and so are the others.
        batch_size: Samples in one forward pass.
        seed: For the metric ``random``.
        kl_positions: Where answers are compared.
        blocks: Whether whole blocks are skipped as well.
        progress: Told what goes on.

    Raises:
        UsageError: When a metric is not known.
        CalibrationError: When a sample is all padding, or a token is not of the model's vocabulary.
        ScoringError: When activations are not finite, there is no token, or a metric needs what
            the model lacks.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """
    wanted = metrics_named(metrics)
    refuse_unfit(loaded.model, wanted)
    check_text(loaded, text.input_ids, text.mask)
    layers = _checked_layers(loaded)
    subject = Subject(loaded.model, layers, text, batch_size, seed, kl_positions, blocks, progress)
    return _scored(loaded, subject, wanted)


NO_TEXT = CalibrationText(
    CalibrationRef(
        source="none (nothing here reads text)",
        samples=0,
        sequence_length=0,
        tokens=0,
        sha256=sha256_bytes(b""),
    ),
    np.zeros((0, 0), np.int64),
    np.zeros((0, 0), np.bool_),
)
"""What metrics that read no text are scored on."""

_PASSES: tuple[tuple[type[Metric], Callable[[Subject, Sequence[Any]], list[list[Score]]]], ...] = (
    (StreamMetric, stream_scores),
    (GradientMetric, gradient_scores),
    (AnswerMetric, answer_scores),
    (FixedMetric, fixed_scores),
)


def _scored(loaded: LoadedModel, subject: Subject, metrics: Sequence[Metric]) -> ImportanceReport:
    found: dict[str, list[Score]] = {}
    for sort, scores in _PASSES:
        some = [metric for metric in metrics if isinstance(metric, sort)]
        if some:
            with _telling_where(subject):
                tables = scores(subject, some)
            found.update(zip((metric.name for metric in some), tables, strict=True))
    return report_of(loaded.ref, subject.text.ref, metrics, found)


def report_of(
    model: ModelRef,
    text: CalibrationRef,
    metrics: Sequence[Metric],
    found: Mapping[str, list[Score]],
) -> ImportanceReport:
    """The report of what was found.

    Args:
        model: What was scored.
        text: On what.
        metrics: By what; the first is the report's own.
        found: Each metric's scores, by its name.
    """
    first, *others = (metric.name for metric in metrics)
    return ImportanceReport(
        model=model,
        metric=first,
        calibration=text,
        scores=found[first],
        further=[MetricScores(metric=name, scores=found[name]) for name in others],
        made_from={"model": model.sha256, "calibration": text.sha256},
    )


@contextlib.contextmanager
def _telling_where(subject: Subject) -> Iterator[None]:
    """Where logits or gradients are not finite, the stream tells in which layer that began."""
    try:
        yield
    except ScoringError:
        stream_scores(dataclasses.replace(subject, progress=QUIET), [COSINE])
        raise


def _checked_layers(loaded: LoadedModel) -> list[LayerModules]:
    """The model's layers, after a small run has shown that they are what the table says."""
    layers = layer_modules(loaded.model)
    refuse_differing(probe(loaded.model, layers), loaded)
    return layers


def refuse_differing(verdict: ProbeVerdict, loaded: LoadedModel) -> None:
    """Refuses a model whose layers are not what the table says.

    Raises:
        UnknownArchitectureError: The probe found that.
    """
    if verdict == "differs":
        raise UnknownArchitectureError(
            f"In {loaded.ref.architecture} the attention and MLP outputs don't add up to the "
            "residual stream, so their importance can't be told.",
            "This configuration of the model family is not supported.",
        )
