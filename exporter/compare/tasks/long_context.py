"""What a model keeps of a long text: a fact hidden in it, and how well it predicts the end.

A needle is a sentence that gives a place a number, hidden in filler text. It is found where its
number is likelier, after the sentence's beginning is repeated at the end, than three numbers that
the text doesn't hold: one in four by chance. Kamradt's test (2023) generates the answer instead,
which small models fail at any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import LongContext, PerplexityPair
from exporter.compare.quality.agreement import COLUMNS, figures, prefill_logits
from exporter.compare.tasks.likelihood import ContinuationRequest, LikelihoodScorer
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.base import Array
from exporter.errors import ComparisonError
from exporter.models.ablation.damage import Distributions, chunks
from exporter.progress import QUIET, Progress

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the filler a needle lies; there is one needle at each."""

ANSWER_TOKENS = 16
"""Room that an answer needs after its context."""

_PLACES = ("lighthouse", "library", "harbour", "museum", "station")
_DISTRACTORS = 3
_PREDICTED = 0.25  # of a sample, at its end


@dataclass(frozen=True)
class Needle:
    """A context with a fact in it, and answers of which the first is right."""

    context: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def requests(self) -> list[ContinuationRequest]:
        """What to score."""
        return [ContinuationRequest(self.context, answer) for answer in self.answers]


def make_needles(text_model: TextModel, filler: Sequence[int], opening: int = 0) -> list[Needle]:
    """Hides a fact at each depth of a text, whose end gives way to it.

    Args:
        text_model: The model's tokenizer.
        filler: A sample of text; a needle's context is as long.
        opening: Tokens at its start that must stay there.

    Raises:
        ComparisonError: The text has no room for a fact.
    """
    rng = np.random.default_rng(0)
    found = []
    for place, depth in zip(_PLACES, DEPTHS, strict=True):
        numbers = rng.choice(np.arange(1000, 10000), 1 + _DISTRACTORS, replace=False).tolist()
        begin = f"\nThe secret number of the {place} is"
        fact = text_model.encode(f"{begin} {numbers[0]}.\n", special=False)
        asked = text_model.encode(begin, special=False)
        room = len(filler) - len(fact) - len(asked)
        if room <= opening:
            raise ComparisonError(
                f"A context of {len(filler)} tokens has no room for a fact and a question of "
                f"{len(fact) + len(asked)}.",
                "Ask for a longer --long-context.",
                code="context-too-short",
            )
        at = max(opening, round(depth * room))
        context = (*filler[:at], *fact, *filler[at:room], *asked)
        whole = [text_model.encode(f"{begin} {number}.", special=False) for number in numbers]
        answers = tuple(tuple(each[len(asked) :]) for each in whole)
        if len(set(answers)) < len(answers):
            raise ComparisonError(
                "The tokenizer has the same tokens for different numbers, so no needle can be told "
                "from another.",
                "Leave --long-context out.",
                code="needles-alike",
            )
        found.append(Needle(context, answers))
    return found


def compare_long_context(
    scorers: tuple[LikelihoodScorer, LikelihoodScorer],
    text_model: TextModel,
    samples: NDArray[np.int64],
    *,
    opening: int = 0,
    progress: Progress = QUIET,
) -> LongContext:
    """Measures both arms at one length.

    Args:
        scorers: The baseline's and the candidate's.
        text_model: Their tokenizer.
        samples: ``[samples, length]``, tokens of the evaluation text.
        opening: Tokens at the start of each that the tokenizer puts there.
        progress: Hears of what is done.

    Raises:
        ComparisonError: The samples are too short for a fact, or logits aren't finite.
        BackendError: A run fails.
    """
    length = samples.shape[1]
    needles = make_needles(text_model, samples[0].tolist(), opening)
    asked = [request for needle in needles for request in needle.requests()]
    found = []
    for scorer in scorers:
        likelihoods = np.array([each.log_likelihood for each in scorer.score(asked)])
        answers = likelihoods.reshape(len(needles), -1)
        right = answers[:, 0] > answers[:, 1:].max(axis=1)
        found.append(float(right.mean()))
        progress.say(f"long context {length}: {right.sum()} of {len(needles)} needles")
    return LongContext(
        context_length=length,
        needles=len(needles),
        needle_baseline=found[0],
        needle_candidate=found[1],
        perplexity=_perplexity(scorers, samples),
    )


def _perplexity(
    scorers: tuple[LikelihoodScorer, LikelihoodScorer], samples: NDArray[np.int64]
) -> PerplexityPair:
    losses, predicted = np.zeros(2), 0.0
    for number, sample in enumerate(samples):
        pair = (
            prefill_logits(scorers[0].runner, sample),
            prefill_logits(scorers[1].runner, sample),
        )
        total = dict(zip(COLUMNS, _tail(pair, sample, number), strict=True))
        losses += [total["baseline_loss"], total["candidate_loss"]]
        predicted += total["predicted"]
    with np.errstate(over="ignore"):  # a model that is broken enough: infinite
        baseline, candidate = np.exp(losses / predicted)
    return PerplexityPair(baseline=float(baseline), candidate=float(candidate))


def _tail(pair: tuple[Array, Array], sample: NDArray[np.int64], number: int) -> NDArray[np.float64]:
    """The figures of a sample's last quarter, summed."""
    last = len(sample) - 1
    first = last - max(1, int(_PREDICTED * len(sample)))
    total = np.zeros(len(COLUMNS))
    for rows in chunks(first, last, pair[0].shape[-1]):
        targets = sample[rows.start + 1 : rows.stop + 1]
        first_arm, second_arm = (
            Distributions(
                logits[rows].astype(np.float64),
                targets,
                f"The {arm}'s logits in long sample {number}",
            )
            for arm, logits in zip(("baseline", "candidate"), pair, strict=True)
        )
        total += figures(first_arm, second_arm).sum(axis=1)
    return total
