"""The tokens that both arms are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ComparisonError
from exporter.files import sha256_bytes
from exporter.models.texts.packing import pack_tokens, with_ends
from exporter.models.texts.pair_lines import TextPair
from exporter.models.texts.passages import cut_to, paragraphs
from exporter.models.texts.sources import TextSource
from exporter.models.texts.tokenizer import tokenizer_in

RANDOM_TOKENS = "seeded random token ids (there is no tokenizer.json next to the models)"


@dataclass(frozen=True)
class EvaluationTokens:
    """Samples with their origin.

    Attributes:
        token_ids: ``[samples, sequence_length]``, int64.
        source: What a report calls the text.
        sha256: Of the text, or of the ids where they are random.
        is_text: False for random ids, on which a perplexity means nothing.
        overlap: With a stride, the tokens at the start of each sample but the first that the
            sample before has predicted already.
        opening: Tokens that the tokenizer puts at the start of each sample.
    """

    token_ids: NDArray[np.int64]
    source: str
    sha256: str
    is_text: bool
    overlap: int = 0
    opening: int = 0


def tokenize(
    texts: TextSource,
    tokenizer_path: Path,
    *,
    sequence_length: int,
    tokens: int,
    separator_id: int | None,
    stride: int | None = None,
) -> EvaluationTokens:
    """Cuts a text into samples, each opened by what the tokenizer puts before a text.

    Args:
        texts: The evaluation text.
        tokenizer_path: A ``tokenizer.json``.
        sequence_length: Tokens in a sample, opening tokens included.
        tokens: How many to take in all, rounded down to whole samples, one at least.
        separator_id: A token between documents; None puts none.
        stride: Tokens from the start of a sample to the start of the next; None for samples that
            don't overlap.

    Raises:
        ComparisonError: When the tokenizer can't be read, its opening tokens fill a sample, the
            text is shorter than one, or the stride is longer.
        MissingDependencyError: Without the tokenizers library.
    """
    tokenizer = tokenizer_in(tokenizer_path)
    opening, _ = tokenizer.ends
    if len(opening) >= sequence_length:
        raise ComparisonError(
            f"A sample of {sequence_length} tokens has no room for text: {tokenizer_path} "
            f"begins each with {len(opening)} special tokens.",
            "Evaluate on more tokens (--eval-tokens).",
            code="no-room-for-text",
        )
    width = sequence_length - len(opening)
    packed = pack_tokens(
        tokenizer.plain,
        texts,
        sequence_length=1 if stride else width,
        max_samples=max(tokens, width) if stride else max(1, tokens // sequence_length),
        separator_id=separator_id,
    )
    if packed.size < width:
        raise ComparisonError(
            f"The evaluation text {texts.source} has fewer than {sequence_length} tokens.",
            "Name a longer text, or ask for fewer tokens.",
            code="text-too-short",
        )
    windows = _windows(packed.ravel(), width, stride)
    overlap = sequence_length - stride if stride else 0
    return EvaluationTokens(
        with_ends(opening, windows),
        texts.source,
        texts.sha256,
        is_text=True,
        overlap=overlap,
        opening=len(opening),
    )


def tokenize_passages(
    texts: TextSource, tokenizer_path: Path, *, most: int, longest: int
) -> list[NDArray[np.int64]]:
    """Paragraphs of the evaluation text, each with the tokens that the tokenizer adds to a text.

    Args:
        texts: The evaluation text.
        tokenizer_path: A ``tokenizer.json``.
        most: How many; they are spread over the whole text.
        longest: Tokens of one; longer ones lose their end, not what the tokenizer puts behind it.

    Raises:
        ComparisonError: The tokenizer can't be read.
    """
    passages = paragraphs(texts)
    tokenizer = tokenizer_in(tokenizer_path)
    chosen = passages[:: max(1, len(passages) // most)][:most]
    return [np.array(cut_to(tokenizer, passage, longest), np.int64) for passage in chosen]


def tokenize_pairs(
    pairs: Sequence[TextPair], tokenizer_path: Path, *, most: int, longest: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Pairs of texts, each with the tokens that the tokenizer adds to a pair.

    Args:
        pairs: Texts.
        tokenizer_path: A ``tokenizer.json``.
        most: How many; always two that stand together, spread over all.
        longest: Tokens of one; the longer text loses its end.

    Returns:
        The tokens of each, and of which text they are.

    Raises:
        ComparisonError: The tokenizer can't be read.
    """
    couples = [pairs[at : at + 2] for at in range(0, len(pairs), 2)]
    step = max(1, 2 * len(couples) // most)
    chosen = [pair for couple in couples[::step] for pair in couple][:most]
    tokenizer = tokenizer_in(tokenizer_path)
    found = [tokenizer.pair(first, second, longest) for first, second in chosen]
    ids = [np.array(each, np.int64) for each, _ in found]
    return ids, [np.array(types or [0] * len(each), np.int64) for each, types in found]


def random_ids(
    vocabulary: int,
    *,
    sequence_length: int,
    tokens: int,
    stride: int | None = None,
    seed: int = 0,
) -> EvaluationTokens:
    """Samples of random tokens, for KL divergence and agreement where there is no tokenizer."""
    number = max(1, tokens // sequence_length) * sequence_length
    stream = np.random.default_rng(seed).integers(0, vocabulary, number, dtype=np.int64)
    ids = _windows(stream, sequence_length, stride)
    overlap = sequence_length - stride if stride else 0
    digest = sha256_bytes(stream.tobytes())
    return EvaluationTokens(ids, RANDOM_TOKENS, digest, is_text=False, overlap=overlap)


def _windows(stream: NDArray[np.int64], width: int, stride: int | None) -> NDArray[np.int64]:
    """Samples of ``width`` tokens that begin every ``stride`` tokens; what is left over is not."""
    if stride is None:
        return stream.reshape(-1, width)
    if stride >= width:
        raise ComparisonError(
            f"A stride of {stride} leaves no overlap between samples of {width} tokens.",
            "Give a smaller --stride, or none.",
            code="stride-too-long",
        )
    return np.lib.stride_tricks.sliding_window_view(stream, width)[::stride]
