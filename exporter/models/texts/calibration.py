"""The text that importance is measured on, as samples of token ids."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError
from exporter.files import sha256_bytes
from exporter.models.loading.model_class import quiet_transformers
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import classifies_texts, scores_pairs
from exporter.models.texts.documents import Units
from exporter.models.texts.images import image_samples, reads_images
from exporter.models.texts.pairs import RANDOM
from exporter.models.texts.passages import (
    LONGEST_PAIR,
    LONGEST_PASSAGE,
    drawn_pairs,
    drawn_paragraphs,
    pack_pairs,
    pack_passages,
    pack_tokens,
    pairs_to_read,
    with_ends,
)
from exporter.models.texts.samples import CalibrationText as CalibrationText
from exporter.models.texts.self_text import SAMPLED, SELF, sampled_tokens
from exporter.models.texts.sources import DOCSTRINGS, PYDOC, Part, TextSource, read_texts
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
        texts = read_texts(spec, part=part)
        by_pairs = _reads_pairs(loaded, texts, progress)
        if by_pairs or passages:
            longest = min(length, LONGEST_PAIR if by_pairs else LONGEST_PASSAGE)
            units = _units(texts, longest, apart_from, progress)
            tokens = wanted * length
            return _padded_samples(loaded, texts, units, tokens, longest, by_pairs=by_pairs)
        text = _packed(loaded, texts, _units(texts, length, apart_from, progress), wanted, length)
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
    usable = usable_length(model)
    length = wanted if usable is None else min(wanted, usable)
    if length < 1:
        raise CalibrationError(
            f"Samples of {length} tokens hold no text.",
            "Ask for a longer --sequence-length.",
            code="length-out-of-range",
        )
    if length < wanted:
        progress.say(f"calibration: samples of {length} tokens, the most that this model takes")
    return length


def usable_length(model: Any) -> int | None:
    """How many tokens a model takes at once; None where its config sets no limit.

    RoBERTa and its relatives number positions from one behind the padding's id on: a table of
    positions that has a padding row gives up that row and all before it.
    """
    import torch

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit] if isinstance(limit, int) else []
    for name, table in model.named_modules():
        is_position_table = "position" in name.rpartition(".")[2]
        padding = table.padding_idx if isinstance(table, torch.nn.Embedding) else None
        if is_position_table and padding is not None:
            limits.append(table.num_embeddings - padding - 1)
    return min(limits, default=None)


def _packed(
    loaded: LoadedModel, texts: TextSource, units: Units, samples: int, length: int
) -> CalibrationText:
    """Packs a text into samples that begin and end as the tokenizer would have them."""
    tokenizer = tokenizer_of(loaded)
    with quiet_transformers():
        before, after = tokenizer.ends
        inner = _inner_length(length, len(before) + len(after))
        body, documents = pack_tokens(
            tokenizer.plain,
            units,
            sequence_length=inner,
            max_samples=samples,
            separator_id=None if after else tokenizer.end_id,
        )
    if not len(body) and any(units.parts):
        tokens = sum(len(tokenizer.plain(document)) for document in texts.documents)
        raise CalibrationError(
            f"{texts.source} gives {tokens} tokens; one sample takes {inner}.",
            "Give a longer text, or ask for a shorter --sequence-length.",
            code="too-few-tokens",
        )
    ids = with_ends(before, body, after)
    content = texts.content.written()
    return CalibrationText.unpadded(ids, texts.source, texts.sha256, documents, content)


def _reads_pairs(loaded: LoadedModel, texts: TextSource, progress: Progress) -> bool:
    """Whether it reads pairs: those of a file, if it gives texts classes; a reranker always."""
    if not classifies_texts(loaded.model):
        return False
    return bool(pairs_to_read(texts, scores_pairs=scores_pairs(loaded.model), progress=progress))


def _padded_samples(
    loaded: LoadedModel,
    texts: TextSource,
    units: Units,
    tokens: int,
    longest: int,
    *,
    by_pairs: bool,
) -> CalibrationText:
    """Pairs or paragraphs as samples."""
    tokenizer = tokenizer_of(loaded)
    with quiet_transformers():
        if by_pairs:
            _inner_length(longest, 1 + len(tokenizer.pair("a", "a", longest)[0]))
            drawn = drawn_pairs(texts, units)
            made = pack_pairs(tokenizer, drawn, longest=longest, tokens=tokens)
        else:
            _inner_length(longest, sum(map(len, tokenizer.ends)))
            made = pack_passages(tokenizer, drawn_paragraphs(units), longest=longest, tokens=tokens)
    if not len(made.ids) and any(units.parts):
        raise CalibrationError(
            f"{texts.source} gives no tokens.", "Give another text.", code="too-few-tokens"
        )
    check_text(loaded, made.ids, made.mask)
    return made.text(texts)


def _inner_length(length: int, ends: int) -> int:
    if length <= ends:
        raise CalibrationError(
            f"Samples of {length} tokens hold no text: the tokenizer puts {ends} tokens around it.",
            f"Ask for a --sequence-length of {ends + 1} or more, such as 512.",
            code="length-out-of-range",
        )
    return length - ends
