"""The word error rate, by jiwer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.artifacts import TaskResult
from exporter.compare.quality.intervals import difference_interval
from exporter.errors import ComparisonError
from exporter.models.ablation.ratios import Floats
from exporter.optional import require


def word_errors(
    right: Sequence[str], baseline: Sequence[str], candidate: Sequence[str], source: str
) -> TaskResult:
    """Both arms' word error rates: edits of all texts over words of all texts.

    Case and punctuation don't count. The difference's interval is from a paired bootstrap over
    texts.

    Args:
        right: What was said.
        baseline: What the baseline heard.
        candidate: What the candidate heard.
        source: Of the recordings.

    Raises:
        MissingDependencyError: jiwer is not installed.
        ComparisonError: Nothing was said in any of them.
    """
    words, edits = _edits(right, baseline)
    others = _edits(right, candidate)[1]
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
        source=source,
        higher_is_better=False,
    )


def _edits(right: Sequence[str], heard: Sequence[str]) -> tuple[Floats, Floats]:
    """The words of each text, and the edits that make it of what was heard."""
    jiwer = require("jiwer", extra="speech")
    plain = jiwer.Compose(
        [
            jiwer.ToLowerCase(),
            jiwer.RemovePunctuation(),
            jiwer.RemoveMultipleSpaces(),
            jiwer.Strip(),
        ]
    )
    words, edits = np.zeros(len(right)), np.zeros(len(right))
    for number, (want, have) in enumerate(zip(right, heard, strict=True)):
        wanted, had = plain(want), plain(have)
        words[number] = len(wanted.split())
        if not wanted:  # jiwer takes no empty reference: all that was heard is too much
            edits[number] = len(had.split())
            continue
        found = jiwer.process_words(wanted, had)
        edits[number] = found.substitutions + found.deletions + found.insertions
    return words, edits
