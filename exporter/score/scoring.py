"""Scores every attention, MLP and block of a model on a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts import CalibrationRef, ImportanceReport, ModelRef, Score
from exporter.errors import CalibrationError, ScoringError, UsageError
from exporter.files import sha256_bytes
from exporter.models.architectures import layer_modules, unknown_layers
from exporter.models.loading.meta_model import MetaModel
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import probe
from exporter.models.tasks import Tokens
from exporter.models.texts.calibration import CalibrationText, check_text, mixed_text
from exporter.models.texts.images import reads_images
from exporter.models.texts.pairs import scored_pairs
from exporter.models.texts.self_text import SAMPLED
from exporter.models.texts.sources import PYDOC
from exporter.progress import QUIET, Progress
from exporter.score.metric import UNITS, AnswerMetric, Metric, OrderMetric, StreamMetric, of_kind
from exporter.score.options import ScoreOptions, refuse_idle_of_pairs
from exporter.score.passes import ScoredModel, answer_scores, refuse_not_finite, stream_scores
from exporter.score.registry import metrics_named
from exporter.score.streaming import layer_by_layer_scores, layers_of


def score(
    loaded: LoadedModel,
    options: ScoreOptions | None = None,
    *,
    cache_dir: Path | None = None,
    stream_dir: Path | None = None,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model on the text that the user names.

    Args:
        loaded: The model. One from :func:`exporter.models.loading.meta_model.load_meta` need not
            fit into memory: it is scored layer by layer.
        options: By what, and on which text; None: by cosine, on the usual text. Layer by layer
            there is no text that the model samples: the usual one is then ``pydoc``.
        cache_dir: Where sampled text is kept.
        stream_dir: Layer by layer: where the hidden states are kept in a file; None: in memory
            where they fit.
        progress: Told what goes on.

    Raises:
        UsageError: A metric is not known, or wants what a model in shards can't give.
        CalibrationError: The text is too short, or the tokenizer is not the model's.
        TextSourceError: The text can't be read.
        ModelSourceError: A shard can't be read.
        ScoringError: Activations are not finite, a metric needs what the model lacks, or the disk
            has no room for the hidden states.
        UnknownArchitectureError: It is not known where the model keeps its sublayers.
    """
    result = options or ScoreOptions()
    scored = scored_model(loaded, result, cache_dir=cache_dir, progress=progress)
    return _scored(loaded, scored, metrics_named(result.metrics), stream_dir)


def score_on(
    loaded: LoadedModel,
    text: CalibrationText,
    *,
    stream_dir: Path | None = None,
    progress: Progress = QUIET,
    **options: Any,
) -> ImportanceReport:
    """Scores a model on token ids that the caller chose; padding is left out.

    :func:`score` makes the samples itself, all of one length. The options are what of
    :class:`ScoreOptions` isn't said of a text.
    """
    wanted = ScoreOptions(**options)
    scored = scored_model(loaded, wanted, text=text, progress=progress)
    return _scored(loaded, scored, metrics_named(wanted.metrics), stream_dir)


def scored_model(
    loaded: LoadedModel,
    options: ScoreOptions,
    *,
    text: CalibrationText | None = None,  # the samples; None: those that the options ask for
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> ScoredModel:
    """The model with its text, checked before anything long runs."""
    metrics, model = metrics_named(options.metrics), loaded.model
    _check(loaded, options, metrics, text)
    if isinstance(loaded, MetaModel):
        layers = layers_of(loaded)
    else:
        layers = layer_modules(model, both=True)
        if probe(model, layers) == "differs":
            raise unknown_layers(model)
    return ScoredModel(
        model,
        layers,
        text or _asked_text(loaded, options, metrics, cache_dir, progress),
        batch_size=options.batch_size,
        seed=options.seed,
        positions=options.kl_positions,
        blocks=options.blocks,
        progress=progress,
    )


def _check(
    loaded: LoadedModel,
    options: ScoreOptions,
    metrics: Sequence[Metric],
    text: CalibrationText | None,
) -> None:
    """Holds what is asked for against what the model has."""
    model, source = loaded.model, loaded.ref.source
    streamed = isinstance(loaded, MetaModel)
    if streamed:
        refuse_unstreamable(options)
    if any(metric.needs_head for metric in metrics):
        Tokens.of(model)
    if loaded.ref.encoder_layers is not None:
        if text is None:
            refuse_idle_of_pairs(options, "sequence_length", "seed")
        if streamed or of_kind(metrics, OrderMetric):
            what = "--stream" if streamed else of_kind(metrics, OrderMetric)[0].name
            raise UsageError(
                f"{what} is for models of one stack of layers; {source} is an encoder-decoder.",
                f"Leave {what} out; cosine, kl and their like are taken, in memory.",
                code="one-graph-option",
            )
    if text is not None and text.are_images != reads_images(model):
        raise CalibrationError(
            f"The samples are {'images' if text.are_images else 'text'}, which {source} does not "
            "read.",
            "Give samples that are made for the model.",
            code="other-samples",
        )
    if text is not None and not text.are_images:
        check_text(loaded, text.input_ids, text.mask)


def refuse_unstreamable(options: ScoreOptions) -> None:
    """Refuses what can't be scored layer by layer, as far as no model is needed to tell.

    A large model takes minutes to open, since its files are hashed.
    """
    if set(options.calibration).intersection(SAMPLED):
        raise UsageError(
            "A model that is read layer by layer can't sample a text of its own: each token would "
            "read all of the weights.",
            "Give --calibration a text file, hf:DATASET or pydoc.",
            code="self-text-streamed",
        )


def _asked_text(
    loaded: LoadedModel,
    options: ScoreOptions,
    metrics: Sequence[Metric],
    cache_dir: Path | None,
    progress: Progress,
) -> CalibrationText:
    specs = options.calibration
    if loaded.ref.encoder_layers is not None:
        return scored_pairs(loaded, specs, samples=options.samples, progress=progress)
    if not any(metric.reads_text for metric in metrics):
        ref = CalibrationRef(
            source="none (nothing here reads text)",
            samples=0,
            sequence_length=0,
            tokens=0,
            sha256=sha256_bytes(b""),
        )
        return CalibrationText(ref, np.zeros((0, 0), np.int64), np.zeros((0, 0), np.bool_))
    if not specs and isinstance(loaded, MetaModel) and not reads_images(loaded.model):
        specs = (PYDOC,)
        if loaded.model.can_generate():
            progress.say(
                "calibration: pydoc, since a streamed model can't sample a text of its own"
            )
    return mixed_text(
        loaded,
        specs,
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        cache_dir=cache_dir,
        progress=progress,
    )


def _scored(
    loaded: LoadedModel,
    scored: ScoredModel,
    metrics: Sequence[Metric],
    stream_dir: Path | None,
) -> ImportanceReport:
    if isinstance(loaded, MetaModel):
        scores = layer_by_layer_scores(loaded, scored, metrics, stream_dir)
    else:
        of_stream = of_kind(metrics, StreamMetric)
        of_answers = of_kind(metrics, AnswerMetric)
        scores = stream_scores(scored, of_stream) if of_stream else {}
        try:
            scores |= answer_scores(scored, of_answers) if of_answers else {}
        except ScoringError:
            refuse_not_finite(scored, scored.batches)
            raise
    scores |= order_scores(scored, of_kind(metrics, OrderMetric))
    return report_of(loaded.ref, scored.text.part, metrics, scores)


def order_scores(scored: ScoredModel, metrics: Sequence[OrderMetric]) -> dict[str, list[Score]]:
    """The scores by each metric's name; they need no pass at all."""
    return {
        metric.name: [
            Score(layer=layer, kind=kind, score=value, std_error=None)
            for layer, values in enumerate(
                metric.of(len(scored.layers), len(UNITS), np.random.default_rng(scored.seed))
            )
            for kind, value in zip(UNITS, values, strict=True)
        ]
        for metric in metrics
    }


def report_of(
    model: ModelRef,
    text: CalibrationRef,
    metrics: Sequence[Metric],
    scores: Mapping[str, list[Score]],
) -> ImportanceReport:
    """The report of some scores, by their metrics' names."""
    first, *others = (metric.name for metric in metrics)
    return ImportanceReport(
        model=model,
        metric=first,
        calibration=text,
        scores=scores[first],
        further={name: scores[name] for name in others},
        made_from={"model": model.sha256, "calibration": text.sha256},
    )
