"""Samples of a text behind those that have chosen a cut: what is fitted on is another part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exporter.artifacts import CalibrationRef
from exporter.heal.options import HealOptions
from exporter.models.ablation.meter import predicts_tokens
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.calibration import CalibrationText, calibration_text, seed_of, spec_of
from exporter.models.texts.image_reader import reads_images
from exporter.models.texts.images import MOST_IMAGES
from exporter.models.texts.mixtures import joined
from exporter.models.texts.self_text import SAMPLED
from exporter.models.texts.tokenizer import tokenizer_of
from exporter.progress import QUIET, Progress


def further(
    loaded: LoadedModel,
    spec: str,
    text: CalibrationText,
    wanted: int,
    options: HealOptions,
    chosen_on: Sequence[CalibrationRef],
) -> tuple[CalibrationText, bool]:
    """As much of a text behind what has chosen; the text as it is, with True, if it is too short.

    That is, if less is left than was read, and less than has chosen.

    Args:
        loaded: The model.
        spec: The text, as it is named.
        text: Its first samples.
        wanted: How many were asked for.
        options: Their length.
        chosen_on: What has chosen; what is of other texts doesn't count.

    Raises:
        CalibrationError: The model has no tokenizer.
        TextSourceError: The text can't be read.
    """
    chosen = [ref for ref in chosen_on if ref.sha256 == text.ref.sha256]
    if not chosen:
        return text, False
    more = math.ceil(max(ref.tokens for ref in chosen) / _inner_tokens(loaded, text)) + 1
    whole = read_samples(loaded, spec, wanted + more, options, QUIET)
    before = max(_samples_of(loaded, whole, ref) for ref in chosen)
    first, rest = whole.rows(slice(0, before)), whole.rows(slice(before, None))
    rest = rest.first_tokens(text.ref.tokens)
    if len(rest.input_ids) < 2 or rest.ref.tokens < min(text.ref.tokens, first.ref.tokens):
        return text, True
    return rest, False


def text_behind(
    loaded: LoadedModel,
    text: CalibrationText,
    cache_dir: Path | None = None,
    progress: Progress = QUIET,
) -> CalibrationText | None:
    """As much again of the same texts, behind what was taken of them; sampled text anew.

    Args:
        loaded: The model.
        text: The first samples of one text or several.
        cache_dir: Where sampled text is kept.
        progress: Told what goes on.

    Returns:
        None where a text is too short for that.

    Raises:
        CalibrationError: The model can't sample.
        TextSourceError: A text can't be read.
    """
    found = []
    for each in text.apart:
        source, (samples, length) = each.ref.source, each.input_ids.shape
        spec, is_short = spec_of(source), False
        options = HealOptions(sequence_length=length, seed=seed_of(source) + 1)
        if spec in SAMPLED:
            rest = read_samples(loaded, spec, samples, options, progress, cache_dir)
        else:
            rest, is_short = further(loaded, spec, each, samples, options, [each.ref])
        if is_short:
            return None
        found.append(rest)
    return joined(found)


def text_beyond(
    loaded: LoadedModel,
    used: Sequence[CalibrationText],
    samples: int,
    cache_dir: Path | None = None,
    together: int = 1,
) -> CalibrationText:
    """Samples of the same texts behind several parts of them that follow each other.

    As many of each text, and more of the longer ones where others are too short for that.

    Args:
        loaded: The model.
        used: The parts, the first of them from the beginning of each text.
        samples: How many are wanted in all; there may be fewer, or none.
        cache_dir: Where sampled text is kept.
        together: How many give one answer: each text goes on behind a multiple of them.

    Raises:
        TextSourceError: A text can't be read.
    """
    texts = used[0].apart
    taken = [
        rounded_up(sum(len(part.apart[number].input_ids) for part in used), together)
        for number in range(len(texts))
    ]
    found: dict[int, CalibrationText] = {}
    longer, share, missing = list(range(len(texts))), 0, samples
    while longer and missing > 0:
        share += math.ceil(missing / len(longer))
        for number in longer:
            found[number] = _behind(loaded, texts[number], taken[number], share, cache_dir)
        longer = [number for number in longer if len(found[number].input_ids) == share]
        missing = samples - sum(len(text.input_ids) for text in found.values())
    return joined([found[number] for number in range(len(texts))])


def rounded_up(number: int, together: int) -> int:
    """The next multiple of so many."""
    return math.ceil(number / together) * together


def _behind(
    loaded: LoadedModel, text: CalibrationText, taken: int, samples: int, cache_dir: Path | None
) -> CalibrationText:
    """So many samples of a text behind those that were taken of it."""
    source, length = text.ref.source, text.input_ids.shape[1]
    options = HealOptions(sequence_length=length, seed=seed_of(source))
    whole = read_samples(loaded, spec_of(source), taken + samples, options, QUIET, cache_dir)
    return whole.rows(slice(taken, taken + samples))


def _inner_tokens(loaded: LoadedModel, text: CalibrationText) -> int:
    """Of a sample, without those that the tokenizer puts around a text."""
    ends = 0 if text.sources is not None else sum(map(len, tokenizer_of(loaded).ends))
    return int(text.input_ids.shape[1]) - ends


def _samples_of(loaded: LoadedModel, text: CalibrationText, ref: CalibrationRef) -> int:
    """How many of a text's first samples hold the tokens of a part that begins it as well."""
    ends = text.input_ids.shape[1] - _inner_tokens(loaded, text)
    tokens = np.cumsum(text.mask.sum(axis=1) - ends)
    return 1 + int(np.searchsorted(tokens, ref.tokens - ref.samples * ends))


def read_samples(
    loaded: LoadedModel,
    spec: str,
    samples: int,
    options: HealOptions,
    progress: Progress,
    cache_dir: Path | None = None,
) -> CalibrationText:
    """The first samples of a text, or paragraphs with as many tokens; no more images than fit.

    Raises:
        CalibrationError: The text is too short, or the model can't be given it.
        TextSourceError: It can't be read.
    """
    return calibration_text(
        loaded,
        spec,
        samples=min(samples, MOST_IMAGES) if reads_images(loaded.model) else samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        cache_dir=cache_dir,
        passages=not predicts_tokens(loaded.model),
        progress=progress,
    )
