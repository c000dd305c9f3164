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

from exporter.errors import CalibrationError
from exporter.files import sha256_bytes
from exporter.models.anatomy.classifiers import classifies_texts, scores_pairs
from exporter.models.loading.model_source import LoadedModel
from exporter.models.loading.transformers_calls import quiet_transformers
from exporter.models.texts.image_reader import image_samples, reads_images
from exporter.models.texts.packing import pack_tokens, with_ends
from exporter.models.texts.pair_lines import TextPair
from exporter.models.texts.pairs import RANDOM
from exporter.models.texts.passages import (
    LONGEST_PAIR,
    LONGEST_PASSAGE,
    pack_pairs,
    pack_passages,
    pairs_to_read,
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
    spec: str | None = None,
    *,
    samples: int | None = None,
    sequence_length: int = DEFAULT_LENGTH,
    seed: int = 0,
    cache_dir: Path | None = None,
    part: Part = "calibration",
    passages: bool = False,
    progress: Progress = QUIET,
) -> CalibrationText:
    """Makes the samples that a user asked for.

    Args:
        loaded: The model.
        spec: ``self`` (text that the model samples), ``chat`` (the same behind its chat template),
            or what :func:`exporter.models.texts.sources.read_texts` takes; of a model of images
            what :func:`exporter.models.texts.images.read_images` takes. None: ``self`` for a
            model that generates, noise for one of images, else ``pydoc``.
        samples: How many; None: as many as make about 10,000 tokens.
        sequence_length: Tokens in each; cut to what the model can take.
        seed: For ``self``.
        cache_dir: Where sampled text is kept; None: ``$XDG_CACHE_HOME/depthcut``.
        part: What the samples are for; see :func:`exporter.models.texts.sources.read_texts`.
        passages: Makes a sample of each paragraph, of at most 128 tokens and padded, as encoders
            embed them; as many as have the tokens of so many samples. Sampled text has none. A
            reranker has samples of pairs in any case, of at most 256 tokens, and so has each
            classifier of texts for a file of pairs.
        progress: Told what goes on.

    Raises:
        CalibrationError: When the text is shorter than one sample, a sample has no room for text,
            the model takes no text, or its tokenizer does not fit it.
        TextSourceError: When the text can't be read.
    """
    if reads_images(loaded.model):
        return image_samples(loaded, spec, samples=samples, part=part, progress=progress)
    if loaded.model.main_input_name != "input_ids":
        raise CalibrationError(
            f"{loaded.ref.source} takes no text; only text models are scored.", code="takes-no-text"
        )
    length = _fitting_length(loaded.model, sequence_length, progress)
    wanted = samples or math.ceil(DEFAULT_TOKENS / length)
    spec = spec or default_calibration(loaded)
    texts = None if spec in SAMPLED else read_texts(spec, part=part)
    if texts is not None and (pairs := _pairs(loaded, texts, progress)):
        return _paired(loaded, texts, pairs, wanted * length, min(length, LONGEST_PAIR))
    if passages and texts is not None:
        return _passages(loaded, texts, wanted * length, min(length, LONGEST_PASSAGE))
    if texts is None:
        ids = sampled_tokens(
            loaded, wanted, length, seed, cache_dir or default_cache_dir(), progress, spec=spec
        )
        label = f"{spec} (text sampled by the model, seed {seed})"
        digest = sha256_bytes(ids.astype("<i8").tobytes())
    else:
        ids, label, digest = _packed(loaded, texts, wanted, length)
    text = CalibrationText.unpadded(ids, label, digest)
    check_text(loaded, ids, text.mask)
    _tell_if_short(ids, wanted, label, part, progress)
    return text


def spec_of(source: str) -> str:
    """What to name so that the text that a report calls so is read again."""
    named = (*SAMPLED, PYDOC, DOCSTRINGS, RANDOM)
    return next((spec for spec in named if source.startswith(f"{spec} (")), source)


def seed_of(source: str) -> int:
    """The seed of the text that a report calls so; 0 where there is none."""
    seed = _SEED.search(source) if spec_of(source) in SAMPLED else None
    return int(seed[1]) if seed else 0


def check_text(loaded: LoadedModel, input_ids: NDArray[np.int64], mask: NDArray[np.bool_]) -> None:
    """Holds samples against the model that is to read them.

    Args:
        loaded: The model.
        input_ids: ``[samples, tokens]``.
        mask: ``[samples, tokens]``; False marks padding.

    Raises:
        CalibrationError: A sample is all padding, or a token is not of the model's vocabulary.
    """
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


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/depthcut``, or ``~/.cache/depthcut``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthcut"


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
    loaded: LoadedModel, texts: TextSource, samples: int, length: int
) -> tuple[NDArray[np.int64], str, str]:
    """Packs a text into samples that begin and end as the tokenizer would have them."""
    tokenizer = tokenizer_of(loaded)
    with quiet_transformers():
        before, after = tokenizer.ends
        inner = _inner_length(length, len(before) + len(after))
        body = pack_tokens(
            tokenizer.plain,
            texts,
            sequence_length=inner,
            max_samples=samples,
            separator_id=None if after else tokenizer.end_id,
        )
    if not len(body):
        found = sum(len(tokenizer.plain(document)) for document in texts.documents)
        raise CalibrationError(
            f"{texts.source} gives {found} tokens; one sample takes {inner}.",
            "Give a longer text, or ask for a shorter --sequence-length.",
            code="too-few-tokens",
        )
    return with_ends(before, body, after), texts.source, texts.sha256


def _pairs(loaded: LoadedModel, texts: TextSource, progress: Progress) -> Sequence[TextPair]:
    """What a model reads as pairs: those of a file, if it gives texts classes; a reranker always.

    Empty where it reads single texts.
    """
    if not classifies_texts(loaded.model):
        return ()
    return pairs_to_read(texts, scores_pairs=scores_pairs(loaded.model), progress=progress)


def _paired(
    loaded: LoadedModel, texts: TextSource, pairs: Sequence[TextPair], tokens: int, longest: int
) -> CalibrationText:
    """Pairs as samples."""
    tokenizer = tokenizer_of(loaded)
    with quiet_transformers():
        _inner_length(longest, 1 + len(tokenizer.pair("a", "a", longest)[0]))
        ids, mask, types = pack_pairs(tokenizer, pairs, longest=longest, tokens=tokens)
    return _samples(loaded, texts, ids, mask, types)


def _passages(loaded: LoadedModel, texts: TextSource, tokens: int, longest: int) -> CalibrationText:
    """A text's paragraphs as samples."""
    tokenizer = tokenizer_of(loaded)
    with quiet_transformers():
        _inner_length(longest, sum(map(len, tokenizer.ends)))
        ids, mask = pack_passages(tokenizer, texts, longest=longest, tokens=tokens)
    return _samples(loaded, texts, ids, mask)


def _samples(
    loaded: LoadedModel,
    texts: TextSource,
    ids: NDArray[np.int64],
    mask: NDArray[np.bool_],
    types: NDArray[np.int64] | None = None,
) -> CalibrationText:
    """Padded samples with what a report says of them."""
    if not len(ids):
        raise CalibrationError(
            f"{texts.source} gives no tokens.", "Give another text.", code="too-few-tokens"
        )
    check_text(loaded, ids, mask)
    return CalibrationText.padded(ids, mask, texts.source, texts.sha256, types)


def _inner_length(length: int, ends: int) -> int:
    if length <= ends:
        raise CalibrationError(
            f"Samples of {length} tokens hold no text: the tokenizer puts {ends} tokens around it.",
            f"Ask for a --sequence-length of {ends + 1} or more, such as 512.",
            code="length-out-of-range",
        )
    return length - ends


def _tell_if_short(
    ids: NDArray[np.int64], wanted: int, source: str, part: Part, progress: Progress
) -> None:
    """Warns of little text to calibrate on; what is judged on little has wide intervals."""
    if len(ids) < wanted:
        progress.say(f"{source}: the text gives {len(ids)} samples of the {wanted} asked for")
    if ids.size < _FEW_TOKENS and part == "calibration":
        progress.say(f"{source}: warning: only {ids.size} tokens; results will be imprecise")
