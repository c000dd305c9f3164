"""What both arms say, for a reader to see: answers to prompts, and a sentence's neighbours."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import (
    Answer,
    GenerationAgreement,
    LongContext,
    NearestNeighbours,
    Neighbour,
    PerplexityPair,
    QueryNeighbours,
    SampleAnswer,
    SampleAnswers,
)
from exporter.compare.agreement import COLUMNS, check_tokens, figures, prefill_logits
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.encoder_quality import FEWEST_TEXTS, Floats, embed
from exporter.compare.evaluation import EvaluationTokens, Prompts, questions, sentences, tokenize
from exporter.compare.tasks.likelihood import ContinuationRequest, LikelihoodScorer, task_texts
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import agreement, continuations, generate
from exporter.engines.decoding.open_decoder import decoder_on
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.inputs import has_cache
from exporter.engines.runners.base import Array
from exporter.errors import BackendError, ComparisonError
from exporter.models.ablation.damage import Distributions, chunks
from exporter.models.sentence_folder import pooling_of
from exporter.models.texts.passages import cut_to
from exporter.models.texts.sources import TextSource
from exporter.models.texts.tokenizer import tokenizer_in
from exporter.printable import counted
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
    """Hides a fact at each depth of a text, whose end gives way to it."""
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
    samples: NDArray[np.int64],  # `[samples, length]`, tokens of the evaluation text
    *,
    opening: int = 0,
    progress: Progress = QUIET,
) -> LongContext:
    """Measures both arms at one length."""
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


_PROMPT_TOKENS = 64
_LONG_SAMPLES = 2


def generation_agreements(
    pair: Pair, tokens: EvaluationTokens
) -> dict[tuple[str, str], GenerationAgreement]:
    """Continues beginnings of the evaluation text with every arm that is judged."""
    quality = pair.options.quality
    if not quality.agreement_prompts or not (
        tokens.is_text and has_cache(pair.baseline.runner.inputs)
    ):
        return {}
    prompt = min(_PROMPT_TOKENS, tokens.token_ids.shape[1])
    try:
        refuse_steps(pair, pair.judged, prompt + quality.agreement_tokens)
        texts = _continued(pair, tokens.token_ids[: quality.agreement_prompts, :prompt])
    except LeftOutError as reason:
        pair.progress.say(f"generation: left out, {reason}")
        return {}
    return {
        names: agreement(*(texts[name] for name in names), prompt_tokens=prompt)
        for names in pair.held_against
    }


class LeftOutError(Exception):
    """Why nothing is generated."""


def refuse_steps(pair: Pair, arms: Mapping[str, ComparedArm], positions: int) -> None:
    """Refuses to generate where that can't be, before anything runs."""
    if not has_cache(pair.baseline.runner.inputs):
        raise LeftOutError("the models have no KV cache")
    for name, arm in arms.items():
        if not has_cache(arm.runner.inputs):
            raise LeftOutError(f"the {name} has no attention left, so it has no cache")
    if pair.baseline.runner.capabilities.shapes == "compiled":
        raise LeftOutError("torch.compile would compile each of its steps")
    longest = pair.baseline.folder.longest_sequence
    if longest is not None and positions > longest:
        raise LeftOutError(f"the model ends at {longest} positions, and {positions} are needed")


@contextmanager
def decoder_of(arm: ComparedArm, prompt: int, new_tokens: int) -> Iterator[Decoder]:
    """What generates with a running arm."""
    try:
        made = decoder_on(arm.runner)
    except BackendError as error:
        raise LeftOutError(error.message) from error
    with made as decoder:
        try:
            decoder.refuse_unfit(1, prompt, new_tokens)
        except BackendError as error:
            raise LeftOutError(error.message) from error
        yield decoder


def _continued(pair: Pair, prompts: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Every judged arm's greedy texts, one arm at a time."""
    folder, new_tokens = pair.baseline.folder, pair.options.quality.agreement_tokens
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    stop_ids = TextModel.of(folder.onnx, tokenizer).stop_ids
    texts = {}
    for name, arm in pair.judged.items():
        with decoder_of(arm, prompts.shape[1], new_tokens) as decoder:
            texts[name] = continuations(
                decoder,
                prompts,
                new_tokens=new_tokens,
                stop_ids=stop_ids,
                batch_size=arm.runner.capabilities.batch_size,
                arm=name,
                progress=pair.progress,
            )
    return texts


def long_contexts(pair: Pair, texts: TextSource) -> list[LongContext]:
    """Needles and perplexity at each length that was asked for."""
    lengths = pair.options.quality.long_context
    return [_long_context(pair, texts, length) for length in lengths]


def _long_context(pair: Pair, texts: TextSource, length: int) -> LongContext:
    folder = pair.baseline.folder if pair.baseline.folder.tokenizer else pair.candidate.folder
    text_model = task_texts(folder)
    assert folder.tokenizer is not None  # or task_texts had refused it
    longest = folder.longest_sequence
    if longest is not None and length + ANSWER_TOKENS > longest:
        raise ComparisonError(
            f"A context of {length} tokens and its answer don't fit the model's {longest} "
            "positions.",
            "Ask for a shorter --long-context.",
            code="context-too-long",
        )
    tokens = tokenize(
        texts,
        folder.tokenizer,
        sequence_length=length,
        tokens=_LONG_SAMPLES * length,
        separator_id=folder.end_of_text,
    )
    first, second = (
        LikelihoodScorer.of(runner, folder, vocabulary=pair.vocabulary()) for runner in pair.runners
    )
    return compare_long_context(
        (first, second),
        text_model,
        tokens.token_ids,
        opening=tokens.opening,
        progress=pair.progress,
    )


_QUERIES = 4
_NEAREST = 2
_NO_TOKENIZER = "there is no tokenizer.json next to the models"


def sample_answers(pair: Pair) -> SampleAnswers | None:
    """What both arms say to the same prompts, by the likeliest token each time."""
    quality = pair.options.quality
    if not quality.answer_tokens:
        return None
    try:
        return _answered(pair, questions(quality.prompts))
    except LeftOutError as reason:
        if quality.prompts is not None:
            raise _unanswered(pair, str(reason)) from reason
        pair.progress.say(f"sample answers: left out, {reason}")
        return SampleAnswers(left_out=str(reason))


def _unanswered(pair: Pair, reason: str) -> ComparisonError:
    return ComparisonError(
        f"The prompts of {pair.options.quality.prompts} can't be answered: {reason}.",
        "Leave --prompts out, or shorten them if they are too long.",
        code="prompts-unanswered",
    )


def _answered(pair: Pair, asked: Prompts) -> SampleAnswers:
    arms = {"baseline": pair.baseline, "candidate": pair.candidate}
    tokenizer = pair.baseline.folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        raise LeftOutError(_NO_TOKENIZER)
    new_tokens = pair.options.quality.answer_tokens
    model = TextModel.of(pair.baseline.folder.onnx, tokenizer)
    shown, ids = _encoded(model, asked, pair.options.quality.chat)
    if max(map(max, ids)) >= pair.vocabulary():
        raise LeftOutError("the tokenizer has tokens that the model doesn't know")
    refuse_steps(pair, arms, max(map(len, ids)) + new_tokens)
    pair.progress.say(
        f"sample answers: {counted(len(ids), 'prompt')}, at most {new_tokens} tokens each"
    )
    said = [_said(pair, name, arm, model, ids) for name, arm in arms.items()]
    answers = [
        SampleAnswer(prompt=prompt, baseline=first, candidate=second)
        for prompt, first, second in zip(shown, *said, strict=True)
    ]
    chat = pair.options.quality.chat
    return SampleAnswers(source=asked.source, chat=chat, new_tokens=new_tokens, answers=answers)


def _encoded(model: TextModel, asked: Prompts, chat: bool) -> tuple[Sequence[str], list[list[int]]]:
    """The prompts as the report shows them, and their tokens."""
    shown = asked.texts if chat else asked.openings
    try:
        # A model that thinks first would not come to its answer.
        ids = (
            model.encode_chats(shown, enable_thinking=False)
            if chat
            else [model.encode(text) for text in shown]
        )
    except BackendError as error:
        raise LeftOutError(error.message.rstrip(".")) from error
    if not all(ids):
        raise LeftOutError(f"prompt {ids.index([]) + 1} has no tokens")
    return shown, ids


def _said(
    pair: Pair, name: str, arm: ComparedArm, model: TextModel, prompts: Sequence[list[int]]
) -> list[Answer]:
    """One arm's answers."""
    new_tokens, found = pair.options.quality.answer_tokens, []
    with (
        decoder_of(arm, max(map(len, prompts)), new_tokens) as decoder,
        pair.progress.task(f"sample answers, {name}", total=len(prompts), unit="prompts") as task,
    ):
        for ids in prompts:
            made = generate(decoder, ids, new_tokens=new_tokens, stop_ids=model.stop_ids)
            found.append(Answer(text=model.decode(made.token_ids), ended=made.ended))
            task.advance()
    return found


def nearest_neighbours(pair: Pair) -> NearestNeighbours | None:
    """Which sentences each arm puts nearest to some of them, by the cosine of their embeddings."""
    quality, folder = pair.options.quality, pair.baseline.folder
    if not quality.answer_tokens:
        return None
    tokenizer = folder.tokenizer or pair.candidate.folder.tokenizer
    if tokenizer is None:
        pair.progress.say(f"nearest neighbours: left out, {_NO_TOKENIZER}")
        return NearestNeighbours(left_out=_NO_TOKENIZER)
    asked = sentences(quality.prompts)
    if len(asked.texts) < FEWEST_TEXTS:
        raise ComparisonError(
            f"{asked.source} holds {counted(len(asked.texts), 'sentence')}; {FEWEST_TEXTS} are "
            "needed to tell which are nearest.",
            "Add some, or leave --prompts out.",
            code="too-few-sentences",
        )
    encode, longest = tokenizer_in(tokenizer), folder.longest_sequence or sys.maxsize
    ids = [np.array(cut_to(encode, text, longest), np.int64) for text in asked.texts]
    check_tokens(max(int(each.max()) for each in ids), pair.vocabulary())
    pooling = pooling_of(folder.home)
    first, second = (
        embed(arm.runner, ids, arm=name, pooling=pooling, progress=pair.progress)
        for name, arm in (("baseline", pair.baseline), ("candidate", pair.candidate))
    )
    queries = [
        QueryNeighbours(
            query=asked.texts[row],
            baseline=_nearest(first, row, asked.texts),
            candidate=_nearest(second, row, asked.texts),
        )
        for row in range(min(_QUERIES, len(ids)))
    ]
    return NearestNeighbours(source=asked.source, sentences=len(ids), queries=queries)


def _nearest(vectors: Floats, row: int, texts: Sequence[str]) -> list[Neighbour]:
    """The sentences nearest to one, itself left out.

    vectors: embeddings of length 1, `[sentences, size]`.
    """
    cosines = vectors @ vectors[row]
    others = [each for each in np.argsort(-cosines, kind="stable") if each != row]
    return [
        Neighbour(sentence=texts[each], cosine=float(cosines[each])) for each in others[:_NEAREST]
    ]
