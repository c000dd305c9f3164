"""The text that importance is measured on, as samples of token ids."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError, DepthcutError
from exporter.files import sha256_bytes
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import LoadedModel
from exporter.models.model_folder import longest_sequence
from exporter.models.residual_stream import classifies_texts, scores_pairs, together_in
from exporter.models.texts.documents import Units
from exporter.models.texts.images import image_samples, reads_images
from exporter.models.texts.passages import (
    LONGEST_PAIR,
    LONGEST_PASSAGE,
    Form,
    pairs_to_read,
    sampled,
)
from exporter.models.texts.samples import CalibrationText as CalibrationText
from exporter.models.texts.samples import Sources
from exporter.models.texts.self_text import SAMPLED, SELF, sampled_tokens
from exporter.models.texts.sources import DOCSTRINGS, PYDOC, RANDOM, Part, TextSource, read_texts
from exporter.models.texts.tokenizer import tokenizer_of
from exporter.progress import QUIET, Progress

DEFAULT_TOKENS = 10_000
DEFAULT_LENGTH = 512
_FEW_TOKENS = 2_000
_SEED = re.compile(r"seed ([0-9]{1,18})")


def calibration_text(
    loaded: LoadedModel,
    spec: str | None = None,  # None: :func:`default_calibration`
    *,
    samples: int | None = None,  # None: as many as make about 10,000 tokens
    sequence_length: int = DEFAULT_LENGTH,  # cut to what the model can take
    seed: int = 0,  # of text that the model samples
    cache_dir: Path | None = None,  # keeps that text; None: :func:`default_cache_dir`
    part: Part = "calibration",
    passages: bool = False,
    apart_from: Sequence[CalibrationRef] = (),
    progress: Progress = QUIET,
) -> CalibrationText:
    """Makes the samples that a user asked for, drawn at random over the whole text.

    The first of them are the same however many are asked for. ``passages`` makes a sample of each
    paragraph, as encoders embed them, as many as have the tokens of so many samples; a reranker has
    samples of pairs in any case, and so has each classifier of texts for a file of pairs.
    ``apart_from`` names parts of the same text that serve other ends: nothing is taken of their
    documents.
    """
    if reads_images(loaded.model):
        return image_samples(
            loaded, spec, samples=samples, part=part, apart_from=apart_from, progress=progress
        )
    if loaded.model.main_input_name != "input_ids":
        raise CalibrationError(
            f"{loaded.ref.source} takes no text; only text models are scored.", code="takes-no-text"
        )
    length = _fitting_length(loaded.model, sequence_length, progress)
    wanted = samples or math.ceil(DEFAULT_TOKENS / length)
    spec = spec or default_calibration(loaded)
    if spec in SAMPLED:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = cache_dir or Path(caches) / "depthcut"
        ids = sampled_tokens(loaded, wanted, length, seed, folder, progress, spec=spec)
        label = f"{spec} (text sampled by the model, seed {seed})"
        text = CalibrationText.unpadded(ids, label, sha256_bytes(ids.astype("<i8").tobytes()))
    else:
        texts, longest = read_texts(spec, part=part), length
        form: Form = "windows"
        if _reads_pairs(loaded, texts, progress):
            form, longest = "pairs", min(length, LONGEST_PAIR)
        elif passages:
            form, longest = "paragraphs", min(length, LONGEST_PASSAGE)
        units = _units(texts, longest, apart_from, progress)
        with quiet_transformers():
            text = sampled(
                form, tokenizer_of(loaded), texts, units, tokens=wanted * length, longest=longest
            )
        if not len(text.input_ids) and any(units.parts):
            raise CalibrationError(
                f"{texts.source} gives fewer tokens than one sample takes ({longest}).",
                "Give a longer text, or ask for a shorter --sequence-length.",
                code="too-few-tokens",
            )
        if form != "windows":
            check_text(loaded, text.input_ids, text.mask)
            return text
    check_text(loaded, text.input_ids, text.mask)
    number, tokens, source = len(text.input_ids), text.input_ids.size, text.ref.source
    if number < wanted:
        progress.say(f"{source}: the text gives {number} samples of the {wanted} asked for")
    if tokens < _FEW_TOKENS and part == "calibration":
        progress.say(f"{source}: warning: only {tokens} tokens; results will be imprecise")
    return text


def _units(
    texts: TextSource, length: int, apart_from: Sequence[CalibrationRef], progress: Progress
) -> Units:
    """The parts of a text that serve one end each, without those that serve other ends."""
    units = texts.units(length)
    if units.are_stretches:
        progress.say(
            f"{texts.source}: few documents; stretches with gaps between them serve as such"
        )
    elif len(units.parts) == 1:
        progress.say(f"{texts.source}: too short to part; all its samples are of one document")
    used = [ref for ref in apart_from if ref.sha256 == texts.sha256]
    parted = {ref.sequence_length: texts.units(ref.sequence_length) for ref in used}
    return units.apart_from(
        frozenset().union(*(parted[ref.sequence_length].keys(ref.spans) for ref in used))
    )


def spec_of(source: str) -> str:
    """What to name so that the text that a report calls so is read again."""
    named = (*SAMPLED, PYDOC, DOCSTRINGS, RANDOM)
    return next((spec for spec in named if source.startswith(f"{spec} (")), source)


def seed_of(source: str) -> int:
    """The seed of the text that a report calls so; 0 where there is none."""
    seed = _SEED.search(source) if spec_of(source) in SAMPLED else None
    return int(seed[1]) if seed else 0


def check_text(loaded: LoadedModel, input_ids: NDArray[np.int64], mask: NDArray[np.bool_]) -> None:
    """Holds samples against the model that is to read them."""
    for sample in np.flatnonzero(~mask.any(axis=1)):
        raise CalibrationError(
            f"Sample {sample} of the calibration text is padding only.",
            "Leave it out.",
            code="padding-only",
        )
    embedding: Any = loaded.model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    for sample, place in np.argwhere((input_ids < 0) | (input_ids >= rows)):
        raise CalibrationError(
            f"Token {input_ids[sample, place]} in sample {sample} of the calibration text is not "
            f"of {loaded.ref.source}, whose embedding has {rows} rows.",
            "The tokenizer does not fit the model: give the model with its own.",
            code="token-out-of-range",
        )


def default_calibration(loaded: LoadedModel) -> str:
    """``self`` for a model that can generate text, noise for one of images, else ``pydoc``."""
    if reads_images(loaded.model):
        return RANDOM
    return SELF if loaded.model.can_generate() else PYDOC


def _fitting_length(model: Any, wanted: int, progress: Progress) -> int:
    usable = longest_sequence(model.config.get_text_config().to_dict())
    length = wanted if usable is None else min(wanted, usable)
    if length < wanted:
        progress.say(f"calibration: samples of {length} tokens, the most that this model takes")
    return length


def _reads_pairs(loaded: LoadedModel, texts: TextSource, progress: Progress) -> bool:
    """Whether it reads pairs: those of a file, if it gives texts classes; a reranker always."""
    if not classifies_texts(loaded.model):
        return False
    return bool(pairs_to_read(texts, scores_pairs=scores_pairs(loaded.model), progress=progress))


class Reading(TypedDict, total=False):
    """How texts are read; see :func:`calibration_text`."""

    samples: int | None
    sequence_length: int
    seed: int
    cache_dir: Path | None
    passages: bool
    progress: Progress


def mixed_text(
    loaded: LoadedModel,
    specs: Sequence[str] = (),
    **how: Unpack[Reading],
) -> CalibrationText:
    """Of several texts one mixture, alike much of each wherever it is cut."""
    texts = [calibration_text(loaded, spec, **how) for spec in specs or (None,)]
    refuse_same(texts)
    return joined(texts, together_in(loaded.model))


def text_of_report(
    loaded: LoadedModel,
    ref: CalibrationRef,
    *,
    calibration: Sequence[str] = (),
    **how: Unpack[Reading],
) -> CalibrationText:
    """The samples that a report's scores rest on, or as many of each of other texts.

    Where the scores rest on no text, that is the usual text for this kind of model.
    """
    how["samples"], how["seed"] = samples_of(ref), seed_of_all(ref)
    how["sequence_length"] = ref.sequence_length or DEFAULT_LENGTH
    text = mixed_text(loaded, calibration or specs_of(ref), **how)
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

    def stacked(arrays: Iterable[NDArray[Any]]) -> Any:
        """``[samples, width]``, in order; shorter samples are padded with zeros."""
        padded = [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]
        return np.concatenate(padded)[order]

    # Single texts beside pairs are first texts.
    types = [np.zeros_like(t.input_ids) if t.types is None else t.types for t in texts]
    return CalibrationText(
        ref,
        stacked(text.input_ids for text in texts),
        stacked(text.mask for text in texts),
        owners=owners[order],
        sources=_joined_sources(texts, order),
        types=stacked(types) if any(text.types is not None for text in texts) else None,
        documents=np.concatenate([text.documents for text in texts])[order],
    )


def _joined_sources(texts: Sequence[CalibrationText], order: NDArray[np.int64]) -> Sources | None:
    """Images of several sources; texts have none."""
    own = [text.sources for text in texts if text.sources is not None]
    if len(own) < len(texts):
        return None
    arrays = {name: np.concatenate([one.arrays[name] for one in own]) for name in own[0].arrays}
    return Sources(arrays, np.concatenate([one.mask for one in own]))[order]


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
