"""How long two models continue the same prompts with the same tokens."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import GenerationAgreement
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.sampling import Sampler, Sampling
from exporter.progress import QUIET, Progress

_END = -1  # stands for each token after one that ends the text


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
    found = []
    with progress.task(f"greedy generation, {arm}", total=len(starts)) as task:
        for start in starts:
            found.append(_continue(decoder, prompts[start : start + rows], new_tokens))
            task.advance()
    return _ended(np.concatenate(found), stop_ids)


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


def _continue(decoder: Decoder, prompts: NDArray[np.int64], new_tokens: int) -> NDArray[np.int64]:
    """Greedy tokens, ``[prompts, new_tokens]``."""
    sampler = Sampler(Sampling())
    context = prompts.shape[1] + new_tokens
    tokens = [sampler.choose(decoder.prefill(prompts, context=context))]
    while len(tokens) < new_tokens:
        tokens.append(sampler.choose(decoder.step(tokens[-1][:, None])))
    return np.stack(tokens, axis=1)


def _ended(tokens: NDArray[np.int64], stop_ids: Collection[int]) -> NDArray[np.int64]:
    stops = np.isin(tokens, list(stop_ids))
    after = np.cumsum(stops, axis=1) - stops > 0
    return np.where(after, _END, tokens)
