"""Several texts as one, alike much of each wherever it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError, DepthcutError
from exporter.files import sha256_bytes
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import together_in
from exporter.models.texts.calibration import (
    DEFAULT_LENGTH,
    CalibrationText,
    calibration_text,
    seed_of,
    spec_of,
)
from exporter.models.texts.samples import Sources
from exporter.progress import QUIET, Progress


def mixed_text(
    loaded: LoadedModel,
    specs: Sequence[str] = (),
    *,
    samples: int | None = None,
    sequence_length: int = DEFAULT_LENGTH,
    seed: int = 0,
    cache_dir: Path | None = None,
    passages: bool = False,
    progress: Progress = QUIET,
) -> CalibrationText:
    """Of several texts one mixture; see :mod:`exporter.models.texts.calibration`."""
    texts = [
        calibration_text(
            loaded,
            spec,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            cache_dir=cache_dir,
            passages=passages,
            progress=progress,
        )
        for spec in specs or (None,)
    ]
    refuse_same(texts)
    return joined(texts, together_in(loaded.model))


def text_of_report(
    loaded: LoadedModel,
    ref: CalibrationRef,
    *,
    calibration: Sequence[str] = (),
    cache_dir: Path | None = None,
    passages: bool = False,
    progress: Progress = QUIET,
) -> CalibrationText:
    """The samples that a report's scores rest on, or as many of each of other texts.

    Where the scores rest on no text, that is the usual text for this kind of model.
    """
    text = mixed_text(
        loaded,
        calibration or specs_of(ref),
        samples=samples_of(ref),
        sequence_length=ref.sequence_length or DEFAULT_LENGTH,
        seed=seed_of_all(ref),
        cache_dir=cache_dir,
        passages=passages,
        progress=progress,
    )
    if ref.samples and not calibration and text.ref.sha256 != ref.sha256:
        raise CalibrationError(
            f"{ref.source} is no longer the text that was scored on.",
            "Score the model again, or name a text for the search: --calibration.",
            code="text-changed",
        )
    return text


def specs_of(ref: CalibrationRef) -> tuple[str, ...]:
    """What to name so that all that a report speaks of is read again; none where it read none."""
    return tuple(spec_of(text.source) for text in ref.texts)


def samples_of(ref: CalibrationRef) -> int | None:
    """How many of full length to take of each text, so that as much comes; None for none."""
    # Of padded ones the last may go beyond what was wanted, by less than a full length.
    full = [
        max(1, calibration.tokens // calibration.sequence_length)
        for calibration in ref.texts
        if calibration.tokens
    ]
    return max(full, default=None)


def seed_of_all(ref: CalibrationRef) -> int:
    """The seed of what the model sampled; 0 where it sampled nothing."""
    return max((seed_of(text.source) for text in ref.texts), default=0)


def cut_to_whole(text: CalibrationText, together: int) -> CalibrationText:
    """Without the last samples, where these give no whole answer."""
    number = len(text.input_ids)
    return text.rows(slice(0, number - number % together)) if number % together else text


def joined(texts: Sequence[CalibrationText], together: int = 1) -> CalibrationText:
    """Several texts as one; answer by answer in turn, so that every part of it is a mixture.

    Each round begins with another text, so that no text stands at every second or fifth place.
    """
    if len(texts) == 1:
        return texts[0]
    texts = [cut_to_whole(text, together) for text in texts]
    rounds = np.concatenate([np.arange(len(text.input_ids)) // together for text in texts])
    owners = np.repeat(np.arange(len(texts)), [len(text.input_ids) for text in texts])
    places = rounds / np.array([len(text.input_ids) for text in texts])[owners]
    order = np.lexsort(((owners + rounds) % len(texts), places))
    refs = tuple(text.ref for text in texts)
    digests = [ref.sha256 for ref in refs]
    ref = CalibrationRef(
        source=" + ".join(calibration.source for calibration in refs),
        samples=sum(calibration.samples for calibration in refs),
        sequence_length=refs[0].sequence_length,
        tokens=sum(calibration.tokens for calibration in refs),
        sha256=digests[0] if len({*digests}) == 1 else sha256_bytes("\n".join(digests).encode()),
        mixture=list(refs),
    )
    width = max(text.input_ids.shape[1] for text in texts)
    # Single texts beside pairs are first texts.
    types = [np.zeros_like(t.input_ids) if t.types is None else t.types for t in texts]
    paired = any(text.types is not None for text in texts)
    return CalibrationText(
        ref,
        _stacked([text.input_ids for text in texts], width)[order],
        _stacked([text.mask for text in texts], width)[order],
        owners=owners[order],
        sources=_joined_sources(texts, order),
        types=_stacked(types, width)[order] if paired else None,
        documents=np.concatenate([text.documents for text in texts])[order],
    )


def _stacked(arrays: Sequence[NDArray[Any]], width: int) -> NDArray[Any]:
    """``[samples, width]``; shorter samples are padded with zeros."""
    return np.concatenate(
        [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]
    )


def _joined_sources(texts: Sequence[CalibrationText], order: NDArray[np.int64]) -> Sources | None:
    """Images of several sources; texts have none."""
    own = [text.sources for text in texts if text.sources is not None]
    if len(own) < len(texts):
        return None
    arrays = {
        name: np.concatenate([sources.arrays[name] for sources in own]) for name in own[0].arrays
    }
    return Sources(arrays, np.concatenate([sources.mask for sources in own])).rows(order)


def refuse_same(
    texts: Sequence[CalibrationText], error: type[DepthcutError] = CalibrationError
) -> None:
    """Refuses a mixture that has a text twice."""
    named: dict[str, str] = {}
    for text in texts:
        if text.ref.sha256 in named:
            raise error(
                f"{named[text.ref.sha256]} and {text.ref.source} are the same text.",
                "Name each text once.",
                code="named-twice",
            )
        named[text.ref.sha256] = text.ref.source
