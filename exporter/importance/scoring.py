"""Runs a model over its calibration text and scores every attention, MLP and block in one pass."""

from __future__ import annotations

from pathlib import Path

from exporter.architectures import layer_modules
from exporter.artifacts import ImportanceReport
from exporter.errors import UnknownArchitectureError
from exporter.importance.calibration import CalibrationText, calibration_text
from exporter.importance.cosine import METRIC, CosineScorer
from exporter.model_source import LoadedModel
from exporter.progress import QUIET, Progress
from exporter.residual_stream import LayerModules, probe, run_backbone, tapped


def score(
    loaded: LoadedModel,
    *,
    calibration: str | None = None,
    samples: int | None = None,
    sequence_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model on the text that the user names.

    Args:
        loaded: The model.
        calibration: ``self``, ``pydoc``, a file or ``hf:DATASET``; None: ``self`` for a model
            that generates text, else ``pydoc``.
        samples: How many samples; None: about 10,000 tokens.
        sequence_length: Tokens in a sample.
        batch_size: Samples in one forward pass.
        seed: For sampled text.
        cache_dir: Where sampled text is kept.
        progress: Told what goes on.

    Raises:
        CalibrationError: When the text is too short.
        TextSourceError: When the text can't be read.
        ScoringError: When activations are not finite.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """
    layers = _checked_layers(loaded)
    text = calibration_text(
        loaded,
        calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        cache_dir=cache_dir,
        progress=progress,
    )
    return _scored(loaded, layers, text, batch_size, progress)


def score_on(
    loaded: LoadedModel,
    text: CalibrationText,
    *,
    batch_size: int = 4,
    progress: Progress = QUIET,
) -> ImportanceReport:
    """Scores a model on token ids that the caller chose; padding is left out.

    For library users whose text comes from elsewhere, such as a tokenized data set with samples of
    unequal length; :func:`score` makes the samples itself, all of one length.

    Args:
        loaded: The model.
        text: The samples, their mask, and what the report shall say about them.
        batch_size: Samples in one forward pass.
        progress: Told what goes on.

    Raises:
        ScoringError: When activations are not finite or there is no token.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """
    return _scored(loaded, _checked_layers(loaded), text, batch_size, progress)


def _scored(
    loaded: LoadedModel,
    layers: list[LayerModules],
    text: CalibrationText,
    batch_size: int,
    progress: Progress,
) -> ImportanceReport:
    import torch

    device = loaded.model.device
    scorer = CosineScorer(len(layers))
    with tapped(layers, scorer), progress.task("score", total=len(text.input_ids)) as task:
        for start in range(0, len(text.input_ids), batch_size):
            ids = torch.from_numpy(text.input_ids[start : start + batch_size]).to(device)
            mask = torch.from_numpy(text.mask[start : start + batch_size]).to(device)
            scorer.begin(mask)
            run_backbone(loaded.model, {"input_ids": ids, "attention_mask": mask.long()})
            scorer.end()
            task.advance(len(ids))
    return ImportanceReport(
        model=loaded.ref,
        metric=METRIC,
        calibration=text.ref,
        scores=scorer.scores(),
        made_from={"model": loaded.ref.sha256, "calibration": text.ref.sha256},
    )


def _checked_layers(loaded: LoadedModel) -> list[LayerModules]:
    """The model's layers, after a small run has shown that they are what the table says."""
    layers = layer_modules(loaded.model)
    if probe(loaded.model, layers) == "differs":
        raise UnknownArchitectureError(
            f"In {loaded.ref.architecture} the attention and MLP outputs don't add up to the "
            "residual stream, so their importance can't be told.",
            "This configuration of the model family is not supported.",
        )
    return layers
