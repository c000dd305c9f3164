"""The loop: prefill, then a token at a time, until the model ends or enough is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.sampling import Sampler, Sampling
from exporter.errors import BackendError

_GREEDY = Sampling()


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
    sampling: Sampling = _GREEDY,
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
        raise BackendError("The prompt holds no token.", "Give it some text.")
    refuse_too_long(decoder, len(prompt_ids), new_tokens, positions)
    stream = _tokens(decoder, prompt_ids, Sampler(sampling), len(prompt_ids) + new_tokens)
    begin = time.perf_counter()
    found: list[int] = []
    times: list[float] = []
    for token in stream:
        times.append(time.perf_counter())
        if token in stop_ids:
            break
        found.append(token)
        if on_token is not None:
            on_token(token)
        if len(found) == new_tokens:
            break
    later = (times[-1] - times[0]) / (len(times) - 1) * 1e3 if len(times) > 1 else None
    ended = len(times) > len(found)
    return Generation(tuple(found), ended, (times[0] - begin) * 1e3, later)


def _tokens(
    decoder: Decoder, prompt_ids: list[int], sampler: Sampler, context: int
) -> Iterator[int]:
    logits = decoder.prefill(np.array([prompt_ids], np.int64), context=context)
    while True:
        token = sampler.choose(logits)
        yield int(token[0])
        logits = decoder.step(token[:, None])


def refuse_too_long(decoder: Decoder, prompt: int, new_tokens: int, positions: int | None) -> None:
    """Refuses a text for which there is no room; the decoder need not be loaded.

    Args:
        decoder: Which is to run it.
        prompt: Tokens of the prompt.
        new_tokens: The most tokens to generate.
        positions: How many positions the model knows; None where nothing says so.

    Raises:
        BackendError: It says what is asked for and what there is room for.
    """
    if positions is not None and prompt + new_tokens > positions:
        raise BackendError(
            f"The model knows {positions} positions; prompt and new tokens together are "
            f"{prompt + new_tokens} ({prompt} + {new_tokens}).",
            "Take a shorter prompt or fewer new tokens.",
        )
    decoder.refuse_unfit(1, prompt, new_tokens)
