"""How far two encoder-decoders' answers differ: teacher-forced, and generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Accuracy, GenerationAgreement, TaskResult
from exporter.compare.agreement import COLUMNS, accuracy_of, figures
from exporter.compare.intervals import difference_interval
from exporter.engines.decoding.encoder_decoder import Encoded, EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Distributions, Floats
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.paired import PairReader
from exporter.models.texts.pairs import Pairs
from exporter.optional import require
from exporter.progress import QUIET, Progress

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
        result = jiwer.process_words(wanted, had)
        edits[number] = result.substitutions + result.deletions + result.insertions
    return words, edits


ARMS = ("baseline", "candidate")


@dataclass(frozen=True)
class Judged:
    """What both arms are judged on."""

    reader: PairReader
    pairs: Pairs
    text: CalibrationText

    @property
    def samples(self) -> int:
        """How many pairs."""
        return len(self.text.input_ids)

    def source(self, sample: int) -> dict[str, Array]:
        """What the encoder reads, ``[1, ...]``, without padding where it takes any length."""
        assert self.text.sources is not None
        row = self.text.sources.rows(slice(sample, sample + 1))
        if "input_ids" not in row.arrays:
            return dict(row.arrays)
        return {name: array[:, row.mask[0]] for name, array in row.arrays.items()}

    def target(self, sample: int) -> NDArray[np.int64]:
        """The decoder's tokens, ``[1, tokens]``."""
        return self.text.input_ids[sample : sample + 1, self.text.mask[sample]]


def judge_answers(
    arms: Mapping[str, EncoderDecoderRunner], judged: Judged, progress: Progress = QUIET
) -> Accuracy:
    """Holds the candidate's answers against the baseline's.

    Teacher-forced: both decoders read the same target, and their distributions of each next token
    are compared; there is a perplexity where the right targets are known. Generated: both answer
    by themselves. Of recordings with transcripts there is a word error rate.
    """
    most = judged.reader.answer_tokens
    prompt = len(judged.reader.rules.prompt)
    by_sample = np.zeros((len(COLUMNS), judged.samples))
    answers: dict[str, list[list[int]]] = {name: [] for name in ARMS}
    with progress.task("judge answers", total=judged.samples, unit="samples") as task:
        for sample in range(judged.samples):
            encoded = {name: arms[name].encode(judged.source(sample)) for name in ARMS}
            by_sample[:, sample] = _teacher_forced(arms, encoded, judged, sample).sum(axis=1)
            for name in ARMS:
                row = arms[name].answer(encoded[name], judged.reader.rules, most)[0]
                answers[name].append([int(token) for token in row[prompt:]])
            task.advance()
    # Of targets and order, too: samples of two reports with this hash are the same questions.
    known = accuracy_of(by_sample, judged.pairs.source, judged.pairs.content_sha256)
    same = [one == other for one, other in zip(*(answers[name] for name in ARMS), strict=True)]
    generation = GenerationAgreement(
        prompts=len(same), new_tokens=most, exact_match=float(np.mean(same))
    )
    return known.model_copy(
        update={"generation": generation, "tasks": _transcribed(answers, judged)}
    )


def _teacher_forced(
    arms: Mapping[str, EncoderDecoderRunner],
    encoded: Mapping[str, Encoded],
    judged: Judged,
    sample: int,
) -> Floats:
    """The figures at each position behind the prompt, ``[len(COLUMNS), positions]``."""
    target, first = judged.target(sample), len(judged.reader.rules.prompt) - 1
    targets = target[0, first + 1 :] if judged.pairs.has_targets else target[0, :0]
    distributions = []
    for name in ARMS:
        logits = arms[name].step(encoded[name], target)[0][0, first:-1].astype(np.float64)
        what = f"The {name}'s logits in sample {sample}"
        distributions.append(Distributions(logits, targets, what))
    return figures(*distributions)


def _transcribed(answers: Mapping[str, list[list[int]]], judged: Judged) -> list[TaskResult]:
    """The word error rate of recordings whose words are known."""
    if not (judged.reader.hears and judged.pairs.has_targets):
        return []
    right = [pair.target or "" for pair in judged.pairs.pairs[: judged.samples]]
    said = {name: [judged.reader.text(row) for row in answers[name]] for name in ARMS}
    plain, source = normalizer_of(judged.reader), judged.pairs.source
    return [word_errors(right, said["baseline"], said["candidate"], source, plain)]
