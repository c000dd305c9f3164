"""What both arms do beyond the next token: greedy continuations, and long contexts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import GenerationAgreement, LongContext
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.evaluation import EvaluationTokens, tokenize
from exporter.compare.tasks.likelihood import LikelihoodScorer
from exporter.compare.tasks.long_context import ANSWER_TOKENS, compare_long_context
from exporter.compare.tasks.opening import task_texts
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import agreement, continuations
from exporter.engines.decoding.open_decoder import decoder_on
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.inputs import has_cache
from exporter.errors import BackendError, ComparisonError
from exporter.models.texts.sources import TextSource

_PROMPT_TOKENS = 64
_LONG_SAMPLES = 2


def generation_agreements(
    pair: Pair, tokens: EvaluationTokens
) -> dict[tuple[str, str], GenerationAgreement]:
    """Continues beginnings of the evaluation text with every arm that is judged.

    Returns:
        By the arms' names, as ``pair.held_against`` has them; empty for random tokens or without
        a cache.

    Raises:
        BackendError: A run fails.
    """
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
    """Refuses to generate where that can't be, before anything runs.

    Args:
        pair: Running arms.
        arms: Those that are to generate, by name.
        positions: How long the longest text may get.

    Raises:
        LeftOutError: An arm has no cache, would be compiled for each step, or ends earlier.
    """
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
    """What generates with a running arm.

    Args:
        arm: It has a cache.
        prompt: Tokens of the longest prompt.
        new_tokens: The most that are generated.

    Raises:
        LeftOutError: It has no room for that.
    """
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
    """Needles and perplexity at each length that was asked for.

    Raises:
        ComparisonError: The text or the model is too short for a length, or there is no tokenizer.
        BackendError: A run fails.
    """
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
