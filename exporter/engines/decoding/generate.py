"""The loop: prefill, then a token at a time; one text, or the greedy texts of many prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import GenerationAgreement
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.sampling import Sampler, SamplingSettings
from exporter.errors import BackendError
from exporter.progress import QUIET, Progress

_GREEDY = SamplingSettings()
_END = -1  # stands for each token after one that ends the text


@dataclass(frozen=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        token_ids: The new tokens; the one that ended the text is not among them.
        ended: Whether the model ended by itself.
        first_token_ms: From the call to the first token.
        per_token_ms: Mean over the later tokens; None with fewer than two.
    """

    token_ids: tuple[int, ...]
    ended: bool
    first_token_ms: float
    per_token_ms: float | None


def generate(
    decoder: Decoder,
    prompt_ids: list[int],
    *,
    new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: SamplingSettings = _GREEDY,
    positions: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Generates from one prompt.

    Args:
        decoder: A loaded decoder.
        prompt_ids: At least one token.
        new_tokens: The most tokens to generate, at least one.
        stop_ids: Tokens that end the text.
        sampling: How tokens are chosen.
        positions: How many positions the model knows; None where nothing says so.
        on_token: Called with each new token as it comes.

    Raises:
        BackendError: The prompt is empty, the text would be longer than the model or the decoder
            has room for, or the decoder fails.
    """
    if not prompt_ids:
        raise BackendError("The prompt holds no token.", "Give it some text.", code="no-tokens")
    refuse_too_long(decoder, len(prompt_ids), new_tokens, positions)
    prompts = np.array([prompt_ids], np.int64)
    stream = _tokens(decoder, prompts, Sampler(sampling), len(prompt_ids) + new_tokens)
    begin = time.perf_counter()
    found: list[int] = []
    times: list[float] = []
    for token in islice(stream, new_tokens):
        times.append(time.perf_counter())
        if int(token[0]) in stop_ids:
            break
        found.append(int(token[0]))
        if on_token is not None:
            on_token(found[-1])
    later = (times[-1] - times[0]) / (len(times) - 1) * 1e3 if len(times) > 1 else None
    ended = len(times) > len(found)
    return Generation(tuple(found), ended, (times[0] - begin) * 1e3, later)


def refuse_too_long(decoder: Decoder, prompt: int, new_tokens: int, positions: int | None) -> None:
    """Refuses a text for which there is no room; the decoder need not be loaded.

    Raises:
        BackendError: It says what is asked for and what there is room for.
    """
    if positions is not None and prompt + new_tokens > positions:
        raise BackendError(
            f"The model knows {positions} positions; prompt and new tokens together are "
            f"{prompt + new_tokens} ({prompt} + {new_tokens}).",
            "Take a shorter prompt or fewer new tokens.",
            code="context-too-long",
        )
    decoder.refuse_unfit(1, prompt, new_tokens)


def continuations(
    decoder: Decoder,
    prompts: NDArray[np.int64],
    *,
    new_tokens: int,
    stop_ids: Collection[int] = (),
    batch_size: int | None = None,
    arm: str = "it",
    progress: Progress = QUIET,
) -> NDArray[np.int64]:
    """Continues prompts greedily.

    Args:
        decoder: A loaded decoder.
        prompts: ``[prompts, tokens]``.
        new_tokens: How many tokens to generate.
        stop_ids: Tokens that end a text; what comes after one doesn't count.
        batch_size: Prompts that run together; None for all.
        arm: What the listener hears it called.
        progress: Hears of each part.

    Returns:
        Tokens, ``[prompts, new_tokens]``; -1 for each after one that ends the text.

    Raises:
        BackendError: A run fails, or logits are NaN.
    """
    rows = batch_size or len(prompts)
    starts = range(0, len(prompts), rows)
    sampler, context = Sampler(_GREEDY), prompts.shape[1] + new_tokens
    found = []
    with progress.task(f"greedy generation, {arm}", total=len(starts), unit="batches") as task:
        for start in starts:
            stream = _tokens(decoder, prompts[start : start + rows], sampler, context)
            found.append(np.stack(list(islice(stream, new_tokens)), axis=1))
            task.advance()
    tokens = np.concatenate(found)
    stops = np.isin(tokens, list(stop_ids))
    after = np.cumsum(stops, axis=1) - stops > 0
    return np.where(after, _END, tokens)


def agreement(
    baseline: NDArray[np.int64], candidate: NDArray[np.int64], *, prompt_tokens: int
) -> GenerationAgreement:
    """How long two arms' texts are the same.

    Args:
        baseline: What :func:`continuations` gave, ``[prompts, new_tokens]``.
        candidate: Likewise.
        prompt_tokens: Tokens of each prompt.
    """
    same = baseline == candidate
    prompts, new_tokens = same.shape
    divergence = np.where(same.all(axis=1), new_tokens, same.argmin(axis=1))
    return GenerationAgreement(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        exact_match=float(same.all(axis=1).mean()),
        first_divergence=divergence.tolist(),
    )


def _tokens(
    decoder: Decoder, prompts: NDArray[np.int64], sampler: Sampler, context: int
) -> Iterator[NDArray[np.int64]]:
    """The next token of each sequence, ``[batch]``, again and again."""
    logits = decoder.prefill(prompts, context=context)
    while True:
        token = sampler.choose(logits)
        yield token
        logits = decoder.step(token[:, None])
