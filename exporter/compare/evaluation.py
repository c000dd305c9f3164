"""The tokens that both arms are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ComparisonError
from exporter.files import sha256_bytes
from exporter.models.ablation.damage import Clusters
from exporter.models.texts.passages import (
    cut_to,
    drawn_pairs,
    drawn_paragraphs,
    pack_tokens,
    with_ends,
)
from exporter.models.texts.sources import TextSource, read_prompts
from exporter.models.texts.tokenizer import tokenizer_in

RANDOM_TOKENS = "seeded random token ids (there is no tokenizer.json next to the models)"


@dataclass(frozen=True)
class EvaluationTokens:
    """Samples with their origin."""

    ids: Sequence[NDArray[np.int64]]  # of each sample `[tokens]`
    source: str
    sha256: str
    is_text: bool = True
    documents: Clusters = None  # `[samples]`, the numbers of the units of the text that they are of
    types: Sequence[NDArray[np.int64]] | None = None  # of pairs, of which text each token is

    @property
    def largest(self) -> int:
        """The largest token."""
        return max((int(ids.max(initial=0)) for ids in self.ids), default=0)


def tokenize(
    texts: TextSource,
    tokenizer_path: Path,
    *,
    sequence_length: int,
    tokens: int,
    separator_id: int | None,
) -> EvaluationTokens:
    """Draws samples over a whole text, each opened by what the tokenizer puts before a text."""
    tokenizer = tokenizer_in(tokenizer_path)
    opening, _ = tokenizer.ends
    if len(opening) >= sequence_length:
        raise ComparisonError(
            f"A sample of {sequence_length} tokens has no room for text: {tokenizer_path} "
            f"begins each with {len(opening)} special tokens.",
            "Evaluate on more tokens (--eval-tokens).",
            code="text-too-short",
        )
    windows, documents = pack_tokens(
        tokenizer.plain,
        texts.units(sequence_length),
        sequence_length=sequence_length - len(opening),
        max_samples=max(1, tokens // sequence_length),
        separator_id=separator_id,
        by_size=True,
    )
    if not len(windows):
        raise ComparisonError(
            f"The evaluation text {texts.source} has fewer than {sequence_length} tokens.",
            "Name a longer text, or ask for fewer tokens.",
            code="text-too-short",
        )
    ids = [*with_ends(opening, windows)]
    return EvaluationTokens(ids, texts.source, texts.sha256, documents=_clusters(documents))


def tokenize_passages(
    texts: TextSource, tokenizer_path: Path, *, most: int, longest: int
) -> EvaluationTokens:
    """Paragraphs of the evaluation text, each with the tokens that the tokenizer adds to a text."""
    tokenizer = tokenizer_in(tokenizer_path)
    drawn = [*islice(drawn_paragraphs(texts.units(longest), by_size=True), most)]
    ids = [np.array(cut_to(tokenizer, text, longest), np.int64) for _, text in drawn]
    documents = _clusters([unit for unit, _ in drawn])
    return EvaluationTokens(ids, texts.source, texts.sha256, documents=documents)


def tokenize_pairs(
    texts: TextSource, tokenizer_path: Path, *, most: int, longest: int
) -> EvaluationTokens:
    """Pairs of texts, each with the tokens that the tokenizer adds to a pair."""
    tokenizer = tokenizer_in(tokenizer_path)
    drawn = [*islice(drawn_pairs(texts, texts.units(longest), by_size=True), most)]
    tokens = [tokenizer.pair(*pair, longest) for _, pair in drawn]
    ids = [np.array(row, np.int64) for row, _ in tokens]
    types = [np.array(types or [0] * len(row), np.int64) for row, types in tokens]
    documents = _clusters([unit for unit, _ in drawn])
    return EvaluationTokens(ids, texts.source, texts.sha256, documents=documents, types=types)


def _clusters(documents: Sequence[int] | NDArray[np.int64]) -> Clusters:
    """Of which document each sample is; samples of a single one count as one each."""
    return np.asarray(documents, np.int64) if len(set(documents)) > 1 else None


def random_ids(
    vocabulary: int,
    *,
    sequence_length: int,
    tokens: int,
    seed: int = 0,
) -> EvaluationTokens:
    """Samples of random tokens, for KL divergence and agreement where there is no tokenizer."""
    number = max(1, tokens // sequence_length) * sequence_length
    stream = np.random.default_rng(seed).integers(0, vocabulary, number, dtype=np.int64)
    ids = [*stream.reshape(-1, sequence_length)]
    return EvaluationTokens(ids, RANDOM_TOKENS, sha256_bytes(stream.tobytes()), is_text=False)


_BUILT_IN = "built in"
_NEWS = (
    "The meeting was moved from Monday to Wednesday, because the train drivers are on strike and "
    "half of the team can't come to the office."
)
_QUESTIONS = (
    ("What is the capital of France?", "The capital of France is"),
    ("What is 2 + 3?", "Question: What is 2 + 3?\nAnswer:"),
    ("Name three colours.", "Three colours of the rainbow are"),
    (f"Summarise this in one short sentence: {_NEWS}", f"{_NEWS} In short,"),
)
"""For a chat, and for a model that only continues texts."""


@dataclass(frozen=True)
class Prompts:
    """What is asked, and where it is from."""

    texts: tuple[str, ...]
    openings: tuple[str, ...]
    source: str = _BUILT_IN


def questions(path: Path | None) -> Prompts:
    """Prompts for a model that generates."""
    if path is None:
        result, openings = zip(*_QUESTIONS, strict=True)
        return Prompts(result, openings)
    prompts = read_prompts(path)
    return Prompts(prompts.documents, prompts.documents, prompts.source)
