"""Samples of other documents of a text than those that serve another end already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from exporter.artifacts import CalibrationRef
from exporter.heal.options import HealOptions
from exporter.models.ablation.meter import predicts_tokens
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText, calibration_text, seed_of, spec_of
from exporter.models.texts.image_reader import reads_images
from exporter.models.texts.images import MOST_IMAGES
from exporter.models.texts.mixtures import joined
from exporter.models.texts.self_text import SAMPLED
from exporter.progress import QUIET, Progress


def text_behind(
    loaded: LoadedModel,
    text: CalibrationText,
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> CalibrationText | None:
    """As much again of the same texts, of other documents; sampled text anew.

    Returns:
        None where a text is too short for that.
    """
    others = []
    for each in text.apart:
        read = QUIET if spec_of(each.ref.source) not in SAMPLED else progress
        rest = _apart(loaded, [each], len(each.input_ids), cache_dir, read)
        others.append(rest.first_tokens(each.ref.tokens))
        if len(rest.input_ids) < min(2, len(each.input_ids)) or is_less(rest, [each.ref]):
            return None
    return joined(others)


def is_less(text: CalibrationText, used: Sequence[CalibrationRef]) -> bool:
    """Whether there are fewer tokens than in one of several parts."""
    return text.ref.tokens < max((ref.tokens for ref in used), default=0)


def text_beyond(
    loaded: LoadedModel,
    used: Sequence[CalibrationText],
    samples: int,
    cache_dir: Path | None = None,
) -> CalibrationText:
    """Samples of the same texts, of other documents than several parts have.

    As many of each text, and more of the longer ones where others are too short for that.
    """
    texts = list(zip(*(part.apart for part in used), strict=True))
    others: dict[int, CalibrationText] = {}
    longer, share, missing = list(range(len(texts))), 0, samples
    while longer and missing > 0:
        share += math.ceil(missing / len(longer))
        for number in longer:
            others[number] = _apart(loaded, texts[number], share, cache_dir)
        longer = [number for number in longer if len(others[number].input_ids) == share]
        missing = samples - sum(len(text.input_ids) for text in others.values())
    return joined([others[number] for number in range(len(texts))])


def _apart(
    loaded: LoadedModel,
    used: Sequence[CalibrationText],
    samples: int,
    cache_dir: Path | None,
    progress: Progress = QUIET,
) -> CalibrationText:
    """So many samples of one text, of other documents than several parts of it have."""
    source, length = used[0].ref.source, used[0].input_ids.shape[1]
    seed = seed_of(source) + (len(used) if spec_of(source) in SAMPLED else 0)
    options = HealOptions(sequence_length=length, seed=seed)
    refs = [part.ref for part in used]
    text = read_samples(loaded, spec_of(source), samples, options, progress, cache_dir, refs)
    return text.rows(slice(0, samples))


def read_samples(
    loaded: LoadedModel,
    spec: str,
    samples: int,
    options: HealOptions,
    progress: Progress,
    cache_dir: Path | None = None,
    apart_from: Sequence[CalibrationRef] = (),
) -> CalibrationText:
    """Samples of a text, or paragraphs with as many tokens; no more images than fit."""
    return calibration_text(
        loaded,
        spec,
        samples=min(samples, MOST_IMAGES) if reads_images(loaded.model) else samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        cache_dir=cache_dir,
        passages=not predicts_tokens(loaded.model),
        apart_from=apart_from,
        progress=progress,
    )
