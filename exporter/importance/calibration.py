"""The text that importance is measured on, as samples of token ids."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import CalibrationRef
from exporter.errors import CalibrationError
from exporter.importance.self_text import SELF, sampled_tokens
from exporter.loading.model_source import LoadedModel
from exporter.loading.transformers_output import quiet_transformers
from exporter.progress import QUIET, Progress
from exporter.texts import Part, pack_tokens, read_texts

DEFAULT_TOKENS = 10_000
_FEW_TOKENS = 2_000


@dataclass(frozen=True)
class CalibrationText:
    """Samples of token ids.

    Attributes:
        ref: What the report says about the text.
        input_ids: ``[samples, tokens]``, int64.
        mask: ``[samples, tokens]``, boolean; False marks padding.
    """

    ref: CalibrationRef
    input_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]


def calibration_text(
    loaded: LoadedModel,
    spec: str | None = None,
    *,
    samples: int | None = None,
    sequence_length: int = 512,
    seed: int = 0,
    cache_dir: Path | None = None,
    part: Part = "calibration",
    progress: Progress = QUIET,
) -> CalibrationText:
    """Makes the samples that a user asked for.

    Args:
        loaded: The model.
        spec: ``self`` (text that the model samples), or what :func:`exporter.texts.read_texts`
            takes. None: ``self`` for a model that generates, else ``pydoc``.
        samples: How many; None: as many as make about 10,000 tokens.
        sequence_length: Tokens in each; cut to what the model can take.
        seed: For ``self``.
        cache_dir: Where sampled text is kept; None: ``$XDG_CACHE_HOME/depthcut``.
        part: What the samples are for; see :func:`exporter.texts.read_texts`.
        progress: Told what goes on.

    Raises:
        CalibrationError: When the text is shorter than one sample, a sample has no room for text,
            the model takes no text, or its tokenizer does not fit it.
        TextSourceError: When the text can't be read.
    """
    if loaded.model.main_input_name != "input_ids":
        raise CalibrationError(f"{loaded.ref.source} takes no text; only text models are scored.")
    length = _fitting_length(loaded.model, sequence_length, progress)
    wanted = samples or math.ceil(DEFAULT_TOKENS / length)
    spec = spec or default_calibration(loaded)
    if spec == SELF:
        ids = sampled_tokens(
            loaded, wanted, length, seed, cache_dir or default_cache_dir(), progress
        )
        label, digest = f"self (text sampled by the model, seed {seed})", _sha256_ids(ids)
    else:
        ids, label, digest = _packed(loaded, spec, wanted, length, part)
    mask = np.ones(ids.shape, dtype=np.bool_)
    check_text(loaded, ids, mask)
    _tell_if_short(ids, wanted, label, progress)
    return CalibrationText(_ref(ids, label, digest), ids, mask)


def _ref(ids: NDArray[np.int64], label: str, digest: str) -> CalibrationRef:
    samples, length = ids.shape
    return CalibrationRef(
        source=label, samples=samples, sequence_length=length, tokens=ids.size, sha256=digest
    )


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
            f"Sample {sample} of the calibration text is padding only.", "Leave it out."
        )
    embedding: Any = loaded.model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    for sample, place in np.argwhere((input_ids < 0) | (input_ids >= rows)):
        raise CalibrationError(
            f"Token {input_ids[sample, place]} in sample {sample} of the calibration text is not "
            f"of {loaded.ref.source}, whose embedding has {rows} rows.",
            "The tokenizer does not fit the model: give the model with its own.",
        )


def default_calibration(loaded: LoadedModel) -> str:
    """``self`` for a model that can generate text, else ``pydoc``."""
    return SELF if loaded.model.can_generate() else "pydoc"


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/depthcut``, or ``~/.cache/depthcut``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthcut"


def _fitting_length(model: Any, wanted: int, progress: Progress) -> int:
    usable = usable_length(model)
    length = wanted if usable is None else min(wanted, usable)
    if length < 1:
        raise CalibrationError(
            f"Samples of {length} tokens hold no text.", "Ask for a longer --sequence-length."
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
    loaded: LoadedModel, spec: str, samples: int, length: int, part: Part
) -> tuple[NDArray[np.int64], str, str]:
    """Packs a text into samples that begin and end as the tokenizer would have them."""
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        raise CalibrationError(
            f"{loaded.ref.source} has no tokenizer, so {spec} can't be turned into tokens.",
            "Give a model with its tokenizer or, if it generates, self as the text.",
        )
    texts = read_texts(spec, part=part)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    with quiet_transformers():
        before, after = _special_ends(tokenizer)
        inner = _inner_length(length, len(before) + len(after))
        body = pack_tokens(
            encode,
            texts,
            sequence_length=inner,
            max_samples=samples,
            separator_id=None if after else tokenizer.eos_token_id,
        )
    if not len(body):
        found = sum(len(encode(document)) for document in texts.documents)
        raise CalibrationError(
            f"{texts.source} gives {found} tokens; one sample takes {inner}.",
            "Give a longer text, or ask for a shorter --sequence-length.",
        )
    ends = [np.tile(np.asarray(ids, dtype=np.int64), (len(body), 1)) for ids in (before, after)]
    return np.concatenate([ends[0], body, ends[1]], axis=1), texts.source, texts.sha256


def _inner_length(length: int, ends: int) -> int:
    if length <= ends:
        raise CalibrationError(
            f"Samples of {length} tokens hold no text: the tokenizer puts {ends} tokens around it.",
            f"Ask for a --sequence-length of {ends + 1} or more, such as 512.",
        )
    return length - ends


def _special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts around a text, such as BERT's [CLS] and [SEP]."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _tell_if_short(ids: NDArray[np.int64], wanted: int, source: str, progress: Progress) -> None:
    """Warns of little text; what it is for, scores or a healing's gain, isn't known here."""
    if len(ids) < wanted:
        progress.say(f"{source}: the text gives {len(ids)} samples of the {wanted} asked for")
    if ids.size < _FEW_TOKENS:
        progress.say(f"{source}: warning: only {ids.size} tokens; what rests on them will be rough")


def _sha256_ids(ids: NDArray[np.int64]) -> str:
    from exporter.files import sha256_bytes

    return sha256_bytes(ids.astype("<i8").tobytes())
