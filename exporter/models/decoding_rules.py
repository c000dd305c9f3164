"""What an encoder-decoder's configs say of generation: how a target begins and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ModelSourceError

_S = TypeVar("_S")
Step = Callable[[_S, NDArray[np.int64]], tuple[NDArray[Any], _S]]
"""From a decoder's state and further tokens ``[batch, tokens]`` to the last token's logits
``[batch, vocabulary]``, and the state after them."""

_ENGLISH = "<|en|>"


@dataclass(frozen=True)
class DecodingRules:
    """How targets are generated, greedily.

    Attributes:
        prompt: What each begins with: the start token, and of a speech model what follows it.
        end_ids: Tokens that end one.
        pad_id: Stands behind its end.
        never: Tokens that are never taken.
        never_first: Tokens that don't come first behind the prompt.
    """

    prompt: tuple[int, ...]
    end_ids: frozenset[int]
    pad_id: int
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> DecodingRules:
        """Those of a model's ``config.json`` and ``generation_config.json``.

        A speech model's language is that of its generation config, else English.

        Raises:
            ModelSourceError: They don't say how a target begins.
        """
        told = {**config, **{name: each for name, each in generation.items() if each is not None}}
        start = told.get("decoder_start_token_id")
        if not isinstance(start, int):
            raise ModelSourceError(
                "The model's configs don't say with which token a target begins.",
                "Set decoder_start_token_id in generation_config.json.",
                code="no-start-token",
            )
        end = told.get("eos_token_id")
        ends = [end] if isinstance(end, int) else end or []
        pad = told.get("pad_token_id")
        return cls(
            prompt=(start, *_forced(told)),
            end_ids=frozenset(ends),
            pad_id=pad if isinstance(pad, int) else next(iter(ends), 0),
            never=tuple(told.get("suppress_tokens") or ()),
            never_first=tuple(told.get("begin_suppress_tokens") or ()),
        )


def _forced(told: Mapping[str, Any]) -> list[int]:
    """What comes behind the start token whatever the source is."""
    languages, tasks = told.get("lang_to_id") or {}, told.get("task_to_id") or {}
    pairs = sorted(pair for pair in told.get("forced_decoder_ids") or () if pair[1] is not None)
    found: list[Any] = [told.get("forced_bos_token_id")]
    if languages and tasks:
        language = told.get("language")
        named = _ENGLISH if language is None else f"<|{language}|>"
        found = [languages.get(named), tasks.get(told.get("task") or "transcribe")]
    elif pairs:
        found = [token for _, token in pairs]
    untimed = told.get("no_timestamps_token_id")
    return [each for each in dict.fromkeys([*found, untimed]) if isinstance(each, int)]


def greedy(
    step: Step[_S], state: _S, rules: DecodingRules, batch: int, new_tokens: int
) -> NDArray[np.int64]:
    """Generates targets, at each step the likeliest token.

    Args:
        step: Runs the decoder.
        state: What its first step begins with.
        rules: How targets begin and end.
        batch: How many.
        new_tokens: The most tokens behind the prompt.

    Returns:
        Prompt and new tokens, ``[batch, tokens]``; padding behind an end.
    """
    tokens = np.tile(np.array(rules.prompt, np.int64), (batch, 1))
    found, done = [tokens], np.zeros(batch, np.bool_)
    for number in range(new_tokens):
        logits, state = step(state, tokens)
        last = np.array(logits, np.float32)
        never = [*rules.never, *(rules.never_first if not number else ())]
        last[:, [token for token in never if token < last.shape[1]]] = -np.inf
        tokens = np.where(done, rules.pad_id, last.argmax(axis=-1))[:, None].astype(np.int64)
        found.append(tokens)
        done |= np.isin(tokens[:, 0], list(rules.end_ids))
        if done.all():
            break
    return np.concatenate(found, axis=1)
