"""Scores a model layer by layer, with the weights of one or two layers in memory.

Each layer's weights come once; all of the text goes through it, then the weights go. The sums are
those of the passes in memory, sample by sample, so that the scores are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.artifacts import ImportanceReport
from exporter.errors import UsageError
from exporter.models.loading.meta_model import MetaModel
from exporter.models.texts.calibration import check_text
from exporter.models.texts.self_text import SELF
from exporter.progress import QUIET, Progress
from exporter.score import CalibrationText, ScoreOptions, calibration_text
from exporter.score.fixed_pass import fixed_scores
from exporter.score.metric import FixedMetric, GradientMetric, Metric
from exporter.score.options import KL_POSITIONS
from exporter.score.registry import DEFAULT, metrics_named, reads_text, refuse_unfit
from exporter.score.scoring import NO_TEXT, report_of
from exporter.score.streaming.walk import Walk, WalkSettings
from exporter.score.subject import Subject


def score_streamed(
    meta: MetaModel,
    options: ScoreOptions | None = None,
    *,
    stream_dir: Path | None = None,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model that need not fit into memory, on the text that the user names.

    Args:
        meta: The model, from :func:`exporter.models.loading.meta_model.load_meta`.
        options: By what, and on which text; None: by cosine, on the usual text. Metrics that
            follow gradients need the whole model, and a model that comes layer by layer can't
            sample a text of its own: its usual one is ``pydoc``.
        stream_dir: Where the hidden states are kept in a file; None: in memory where they fit.
        progress: Told what goes on.

    Raises:
        UsageError: A metric is not known, or wants what a streamed model can't give.
        ModelSourceError: A shard can't be read.
        CalibrationError: The text is too short, or the tokenizer is not the model's.
        TextSourceError: The text can't be read.
        ScoringError: Activations are not finite, or the disk has no room for the hidden states.
        UnknownArchitectureError: It is not known where the model keeps its sublayers.
    """
    asked = options or ScoreOptions()
    refuse_unstreamable(asked)
    wanted = _fitting(meta, asked.metrics)
    text = NO_TEXT
    if reads_text(wanted):
        text = calibration_text(
            meta,
            _text_of(meta, asked.calibration, progress),
            samples=asked.samples,
            sequence_length=asked.sequence_length,
            seed=asked.seed,
            progress=progress,
        )
    settings = WalkSettings(
        asked.batch_size, asked.kl_positions, asked.blocks, stream_dir, progress
    )
    return _scored(meta, text, wanted, asked.seed, settings)


def score_streamed_on(
    meta: MetaModel,
    text: CalibrationText,
    *,
    metrics: Sequence[str] = (DEFAULT,),
    batch_size: int = 4,
    seed: int = 0,
    kl_positions: int = KL_POSITIONS,
    blocks: bool = False,
    stream_dir: Path | None = None,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model that need not fit into memory, on token ids that the caller chose.

    Args:
        meta: The model.
        text: The samples, their mask, and what the report shall say about them.
        metrics: As in :class:`ScoreOptions`, and so are the others.
        batch_size: Samples in one forward pass.
        seed: For the metric ``random``.
        kl_positions: Where answers are compared.
        blocks: Whether whole blocks are skipped as well.
        stream_dir: As for :func:`score_streamed`.
        progress: Told what goes on.

    Raises:
        DepthcutError: Whatever :func:`score_streamed` raises, but for reading a text.
    """
    wanted = _fitting(meta, metrics)
    check_text(meta, text.input_ids, text.mask)
    settings = WalkSettings(batch_size, kl_positions, blocks, stream_dir, progress)
    return _scored(meta, text, wanted, seed, settings)


def refuse_unstreamable(options: ScoreOptions) -> None:
    """Refuses what :func:`score_streamed` would, as far as no model is needed to tell.

    A large model takes minutes to open, since its files are hashed.

    Raises:
        UsageError: A metric is not known, or wants what a streamed model can't give.
    """
    _refuse_gradients(metrics_named(options.metrics))
    if options.calibration == SELF:
        raise UsageError(
            "A model that is read layer by layer can't sample a text of its own: each token would "
            "read all of the weights.",
            "Give --calibration a text file, hf:DATASET or pydoc.",
        )


def _fitting(meta: MetaModel, names: Sequence[str]) -> list[Metric]:
    wanted = metrics_named(names)
    _refuse_gradients(wanted)
    refuse_unfit(meta.model, wanted)
    return wanted


def _refuse_gradients(metrics: Sequence[Metric]) -> None:
    for metric in metrics:
        if isinstance(metric, GradientMetric):
            raise UsageError(
                f"{metric.name} follows gradients back through all layers, so it wants the whole "
                "model in memory.",
                "Take cosine or kl, or score the model without --stream.",
            )


def _text_of(meta: MetaModel, spec: str | None, progress: Progress) -> str:
    if spec is None and meta.model.can_generate():
        progress.say("calibration: pydoc, since a streamed model can't sample a text of its own")
    return spec or "pydoc"


def _scored(
    meta: MetaModel,
    text: CalibrationText,
    metrics: Sequence[Metric],
    seed: int,
    settings: WalkSettings,
) -> ImportanceReport:
    before = meta.shards.bytes_read
    walk = Walk(meta, text, metrics, settings)
    found = walk.scores()
    fixed = [metric for metric in metrics if isinstance(metric, FixedMetric)]
    tables = fixed_scores(Subject(meta.model, walk.layers, text, seed=seed), fixed)
    found |= zip((metric.name for metric in fixed), tables, strict=True)
    read, whole = meta.shards.bytes_read - before, meta.shards.nbytes
    settings.progress.detail(
        f"weights read: {read / 1e9:.3g} GB, {read / whole:.2f} times what the shards hold"
    )
    return report_of(meta.ref, text.ref, metrics, found)
