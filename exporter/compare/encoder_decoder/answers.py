"""How far two encoder-decoders' answers differ: teacher-forced, and generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Accuracy, GenerationAgreement, TaskResult
from exporter.compare.encoder_decoder.words import normalizer_of, word_errors
from exporter.compare.quality.agreement import COLUMNS, accuracy_of, figures
from exporter.engines.decoding.encoder_decoder import Encoded, EncoderDecoderRunner
from exporter.engines.runners.base import Array
from exporter.models.ablation.damage import Distributions, Floats
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.paired import PairReader
from exporter.models.texts.pairs import Pairs
from exporter.progress import QUIET, Progress

ARMS = ("baseline", "candidate")


@dataclass(frozen=True)
class Judged:
    """What both arms are judged on.

    Attributes:
        reader: Turns pairs into inputs, and tokens into words.
        pairs: What the user named.
        text: The same as inputs; the targets are the baseline's own where none are given.
    """

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

    Args:
        arms: Baseline and candidate, entered.
        judged: On what.
        progress: Hears of each sample.

    Raises:
        ComparisonError: Logits aren't finite.
        BackendError: A run fails.
        MissingDependencyError: There are transcripts, and jiwer is not installed.
    """
    most = judged.reader.answer_tokens
    prompt, width = len(judged.reader.rules.prompt), judged.text.input_ids.shape[1]
    by_sample = np.zeros((len(COLUMNS), judged.samples))
    by_position = np.zeros((len(COLUMNS), width))
    answers: dict[str, list[list[int]]] = {name: [] for name in ARMS}
    with progress.task("judge answers", total=judged.samples, unit="samples") as task:
        for sample in range(judged.samples):
            encoded = {name: arms[name].encode(judged.source(sample)) for name in ARMS}
            found = _teacher_forced(arms, encoded, judged, sample)
            by_sample[:, sample] = found.sum(axis=1)
            by_position[:, : found.shape[1]] += found
            for name in ARMS:
                row = arms[name].answer(encoded[name], judged.reader.rules, most)[0]
                answers[name].append([int(token) for token in row[prompt:]])
            task.advance()
    # Of targets and order, too: samples of two reports with this hash are the same questions.
    known = accuracy_of(by_sample, by_position, judged.pairs.source, judged.pairs.content_sha256)
    told = {
        "generation": _agreement(answers, prompt, most),
        "tasks": _transcribed(answers, judged),
        "probes_left_out": "probes are for models that continue a text",
    }
    return known.model_copy(update=told)


def _teacher_forced(
    arms: Mapping[str, EncoderDecoderRunner],
    encoded: Mapping[str, Encoded],
    judged: Judged,
    sample: int,
) -> Floats:
    """The figures at each position behind the prompt, ``[len(COLUMNS), positions]``."""
    target, first = judged.target(sample), len(judged.reader.rules.prompt) - 1
    targets = target[0, first + 1 :] if judged.pairs.has_targets else target[0, :0]
    found = []
    for name in ARMS:
        logits = arms[name].step(encoded[name], target)[0][0, first:-1].astype(np.float64)
        what = f"The {name}'s logits in sample {sample}"
        found.append(Distributions(logits, targets, what))
    return figures(*found)


def _agreement(
    answers: Mapping[str, list[list[int]]], prompt: int, new_tokens: int
) -> GenerationAgreement:
    same = [_common(*pair) for pair in zip(*(answers[name] for name in ARMS), strict=True)]
    exact = [one == other for one, other in zip(*(answers[name] for name in ARMS), strict=True)]
    return GenerationAgreement(
        prompts=len(same),
        prompt_tokens=prompt,
        new_tokens=new_tokens,
        exact_match=float(np.mean(exact)),
        first_divergence=[
            new_tokens if alike else length for length, alike in zip(same, exact, strict=True)
        ],
    )


def _common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _transcribed(answers: Mapping[str, list[list[int]]], judged: Judged) -> list[TaskResult]:
    """The word error rate of recordings whose words are known."""
    if not (judged.reader.hears and judged.pairs.has_targets):
        return []
    right = [pair.target or "" for pair in judged.pairs.pairs[: judged.samples]]
    said = {name: [judged.reader.text(row) for row in answers[name]] for name in ARMS}
    plain, source = normalizer_of(judged.reader), judged.pairs.source
    return [word_errors(right, said["baseline"], said["candidate"], source, plain)]
