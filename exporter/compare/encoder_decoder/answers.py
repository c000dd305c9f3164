"""How far two encoder-decoders' answers differ: teacher-forced, and generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Accuracy, GenerationAgreement, TaskResult
from exporter.compare.agreement import COLUMNS, accuracy_of, figures
from exporter.compare.arms import Comparison
from exporter.compare.intervals import difference_interval
from exporter.engines.decoding.encoder_decoder import Encoded, EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Distributions, Floats
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.paired import OWN_TOKENS, PAIRS, PairReader, paired_text, within
from exporter.models.texts.pairs import Pairs
from exporter.models.texts.sources import TextSource
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


@dataclass(frozen=True, kw_only=True)
class JudgedPairs(TextSource):
    """Pairs where a model of one graph has documents, and what makes its inputs of them."""

    asked: Pairs
    reader: PairReader

    @classmethod
    def of(cls, asked: Pairs, reader: PairReader) -> JudgedPairs:
        """Known by their sources, as texts are."""
        return cls(asked.source, (), asked.sha256, asked=asked, reader=reader)

    @property
    def content_sha256(self) -> str:
        """Of targets and order, too: two reports with this hash asked the same."""
        return self.asked.content_sha256


_NOISE = 8
"""Sources of noise that both are judged on."""


@dataclass(frozen=True)
class Judged:
    """The inputs of pairs; the baseline's own answers stand where no targets are known."""

    pairs: JudgedPairs
    text: CalibrationText

    @classmethod
    def drawn(
        cls, pairs: JudgedPairs, whole: EncoderDecoderRunner, tokens: int, progress: Progress
    ) -> Judged:
        """As many of the first pairs as have so many tokens of targets."""
        asked, reader = pairs.asked, pairs.reader
        number = _NOISE if asked.is_random else PAIRS
        if asked.has_targets:
            number = reader.within(asked, tokens)
            if number < len(asked.pairs):
                result = f"on {number:,} of {len(asked.pairs):,} pairs, whose targets"
                progress.say(f"accuracy: {result} have the {tokens:,} tokens of --eval-tokens")

        def generate(sources: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
            return whole.generate(sources, reader.rules, reader.new_tokens(OWN_TOKENS))

        text = paired_text(
            reader, asked, generate, number=number, part="evaluation", progress=progress
        )
        if not asked.has_targets:
            text = text.rows(slice(0, within(text.mask.sum(axis=1), tokens)))
        return cls(pairs, text)

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


def judge_pairs(comparison: Comparison, pairs: JudgedPairs) -> Accuracy:
    """Holds the candidate's answers against the baseline's."""
    arms: dict[str, Any] = {name: comparison.arms[name].runner for name in comparison.pair}
    whole, tokens = arms[comparison.pair[0]], comparison.options.eval_tokens
    judged = Judged.drawn(pairs, whole, tokens, comparison.progress)
    return judge_answers(arms, judged, comparison.progress)


def judge_answers(
    arms: Mapping[str, EncoderDecoderRunner], judged: Judged, progress: Progress = QUIET
) -> Accuracy:
    """Holds the second arm's answers against the first's.

    Teacher-forced: both decoders read the same target, and their distributions of each next token
    are compared; there is a perplexity where the right targets are known. Generated: both answer
    by themselves. Of recordings with transcripts there is a word error rate.
    """
    reader, asked = judged.pairs.reader, judged.pairs.asked
    most, prompt = reader.answer_tokens, len(reader.rules.prompt)
    by_sample = np.zeros((len(COLUMNS), judged.samples))
    answers: dict[str, list[list[int]]] = {name: [] for name in arms}
    with progress.task("judge answers", total=judged.samples, unit="samples") as task:
        for sample in range(judged.samples):
            encoded = {name: arm.encode(judged.source(sample)) for name, arm in arms.items()}
            by_sample[:, sample] = _teacher_forced(arms, encoded, judged, sample).sum(axis=1)
            for name, arm in arms.items():
                row = arm.answer(encoded[name], reader.rules, most)[0]
                answers[name].append([int(token) for token in row[prompt:]])
            task.advance()
    known = accuracy_of(by_sample, asked.source, asked.content_sha256)
    same = [one == other for one, other in zip(*answers.values(), strict=True)]
    generation = GenerationAgreement(
        prompts=len(same), new_tokens=most, exact_match=float(np.mean(same))
    )
    tasks = _transcribed([*answers.values()], judged)
    return known.model_copy(update={"generation": generation, "tasks": tasks})


def _teacher_forced(
    arms: Mapping[str, EncoderDecoderRunner],
    encoded: Mapping[str, Encoded],
    judged: Judged,
    sample: int,
) -> Floats:
    """The figures at each position behind the prompt, ``[len(COLUMNS), positions]``."""
    target, first = judged.target(sample), len(judged.pairs.reader.rules.prompt) - 1
    targets = target[0, first + 1 :] if judged.pairs.asked.has_targets else target[0, :0]
    distributions = []
    for name, arm in arms.items():
        logits = arm.step(encoded[name], target)[0][0, first:-1].astype(np.float64)
        what = f"The {name}'s logits in sample {sample}"
        distributions.append(Distributions(logits, targets, what))
    return figures(*distributions)


def _transcribed(answers: Sequence[list[list[int]]], judged: Judged) -> list[TaskResult]:
    """The word error rate of recordings whose words are known."""
    reader, asked = judged.pairs.reader, judged.pairs.asked
    if not (reader.hears and asked.has_targets):
        return []
    right = [pair.target or "" for pair in asked.pairs[: judged.samples]]
    first, second = ([reader.text(row) for row in rows] for rows in answers)
    return [word_errors(right, first, second, asked.source, normalizer_of(reader))]
