"""The word error rate: words by Whisper's normalisers, edits by jiwer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.artifacts import TaskResult
from exporter.compare.quality.intervals import difference_interval
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Floats
from exporter.models.texts.paired import PairReader
from exporter.optional import require

_UNSPACED = frozenset({"zh", "ja", "th", "lo", "my", "yue"})
"""Languages without spaces between words: each letter counts as one, as Whisper's paper has it."""


@dataclass(frozen=True)
class Normalizer:
    """Makes texts alike that say the same, as published word error rates have it."""

    name: str
    apply: Callable[[str], str]


def normalizer_of(reader: PairReader) -> Normalizer:
    """Whisper's English normaliser for English answers, its basic one for all others.

    British spellings count as American ones where the model's folder has Whisper's list of them,
    ``normalizer.json``.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    known = require("transformers.models.whisper.english_normalizer", extra="speech")
    languages = require(
        "transformers.models.whisper.tokenization_whisper", extra="speech"
    ).LANGUAGES
    tokens = reader.tokenizer.convert_ids_to_tokens(list(reader.rules.prompt))
    marks = [token[2:-2] for token in tokens if token]
    language = next((mark for mark in marks if mark in languages), "")
    if not language and reader.config.get("model_type") == "whisper":
        language = "en"  # only Whisper's English models name none
    if language == "en" or "translate" in marks:
        spellings = getattr(reader.tokenizer, "english_spelling_normalizer", None)
        return Normalizer(
            "Whisper's English normaliser", known.EnglishTextNormalizer(spellings or {})
        )
    basic = known.BasicTextNormalizer(split_letters=language in _UNSPACED)
    return Normalizer("Whisper's basic normaliser", basic)


def word_errors(
    right: Sequence[str],
    baseline: Sequence[str],
    candidate: Sequence[str],
    source: str,
    normalizer: Normalizer,
) -> TaskResult:
    """Both arms' word error rates: edits of all texts over words of all texts.

    The difference's interval is from a paired bootstrap over texts.

    Args:
        right: What was said.
        baseline: What the baseline heard.
        candidate: What the candidate heard.
        source: Of the recordings.
        normalizer: Makes words of texts.

    Raises:
        MissingDependencyError: jiwer is not installed.
        ComparisonError: Nothing was said in any of them.
    """
    words, edits = _edits(right, baseline, normalizer)
    others = _edits(right, candidate, normalizer)[1]
    if not words.sum():
        raise ComparisonError(
            f"The transcripts of {source} hold no words.",
            "Give what is said in the recordings.",
            code="no-words",
        )
    return TaskResult(
        task="transcripts",
        metric="wer",
        items=len(right),
        baseline=float(edits.sum() / words.sum()),
        candidate=float(others.sum() / words.sum()),
        difference=difference_interval(edits, others, words),
        source=f"{source}, by {normalizer.name}",
        higher_is_better=False,
    )


def _edits(
    right: Sequence[str], heard: Sequence[str], normalizer: Normalizer
) -> tuple[Floats, Floats]:
    """The words of each text, and the edits that make it of what was heard."""
    jiwer = require("jiwer", extra="speech")
    words, edits = np.zeros(len(right)), np.zeros(len(right))
    for number, texts in enumerate(zip(right, heard, strict=True)):
        wanted, had = (normalizer.apply(text).strip() for text in texts)
        words[number] = len(wanted.split())
        if not wanted:  # jiwer takes no empty reference: all that was heard is too much
            edits[number] = len(had.split())
            continue
        found = jiwer.process_words(wanted, had)
        edits[number] = found.substitutions + found.deletions + found.insertions
    return words, edits
