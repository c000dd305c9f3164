"""What an encoder-decoder's configs say of generation: how a target begins and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from exporter.errors import ModelSourceError
from exporter.optional import require

_S = TypeVar("_S")
_M = TypeVar("_M", bound=BaseModel)
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Step = Callable[[_S, NDArray[np.int64]], tuple[NDArray[Any], _S]]
"""From a decoder's state and further tokens ``[batch, tokens]`` to the last token's logits
``[batch, vocabulary]``, and the state after them."""


class _Told(BaseModel):
    """What configs say of targets; null where they don't."""

    model_config = ConfigDict(strict=True)

    decoder_start_token_id: _Token | None = None
    eos_token_id: _Token | list[_Token] | None = None
    pad_token_id: _Token | None = None
    suppress_tokens: list[_Token] | None = None
    begin_suppress_tokens: list[_Token] | None = None
    forced_bos_token_id: _Token | None = None
    forced_decoder_ids: list[Annotated[tuple[int, _Token | None], Strict(strict=False)]] | None = (
        None
    )
    no_timestamps_token_id: _Token | None = None
    lang_to_id: dict[str, _Token] | None = None
    task_to_id: dict[str, _Token] | None = None
    language: str | None = None
    task: str | None = None


def settings_of(kind: type[_M], told: Mapping[str, Any], where: str) -> _M:
    """Entries of a model's JSON file, checked.

    Args:
        kind: Their names and types; others don't matter.
        told: The entries.
        where: Whose they are, for errors.

    Raises:
        ModelSourceError: One is of another type, or out of bounds.
    """
    try:
        return kind.model_validate(dict(told))
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        raise ModelSourceError(
            f"{where}: the entry {entry} is wrong: {first['msg']}.",
            "Take the file that belongs to the model.",
            code="odd-setting",
        ) from None


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

        A speech model's language is that of its generation config, else English; it is told as
        transformers takes it: ``de``, ``<|de|>`` or ``german``.

        Raises:
            ModelSourceError: They don't say how a target begins, name a language or a task that
                the model has not, or an entry is of another type.
            MissingDependencyError: The language is told by its name, as ``german``, and
                transformers, which knows the names, is not installed.
        """
        given = {**config, **{name: each for name, each in generation.items() if each is not None}}
        told = settings_of(_Told, given, "config.json or generation_config.json")
        if told.decoder_start_token_id is None:
            raise ModelSourceError(
                "The model's configs don't say with which token a target begins.",
                "Set decoder_start_token_id in generation_config.json.",
                code="no-start-token",
            )
        end = told.eos_token_id
        ends = [end] if isinstance(end, int) else end or []
        pad = told.pad_token_id
        return cls(
            prompt=(told.decoder_start_token_id, *_forced(told)),
            end_ids=frozenset(ends),
            pad_id=next(iter(ends), 0) if pad is None else pad,
            never=tuple(told.suppress_tokens or ()),
            never_first=tuple(told.begin_suppress_tokens or ()),
        )


def _forced(told: _Told) -> list[int]:
    """What comes behind the start token whatever the source is."""
    pairs = sorted(pair for pair in told.forced_decoder_ids or () if pair[1] is not None)
    found = [told.forced_bos_token_id]
    if told.lang_to_id and told.task_to_id:
        task = told.task or "transcribe"
        found = [_language(told.language, told.lang_to_id), told.task_to_id.get(task)]
        if found[1] is None:
            raise _unknown("task", task, told.task_to_id)
    elif pairs:
        found = [token for _, token in pairs]
    untimed = told.no_timestamps_token_id
    return [each for each in dict.fromkeys([*found, untimed]) if each is not None]


def _language(told: str | None, tokens: Mapping[str, int]) -> int:
    """A language's token; it is told as ``de``, ``<|de|>`` or ``german``."""
    language = (told or "en").lower()
    for name in (language, f"<|{language}|>"):
        if name in tokens:
            return tokens[name]
    names = require("transformers.models.whisper.tokenization_whisper", extra="torch")
    token = tokens.get(f"<|{names.TO_LANGUAGE_CODE.get(language)}|>")
    if token is None:
        raise _unknown("language", language, tokens)
    return token


def _unknown(entry: str, told: str, known: Mapping[str, int]) -> ModelSourceError:
    return ModelSourceError(
        f"The model's configs know no {entry} {told}.",
        f"Set {entry} in generation_config.json to one of: {', '.join(known)}.",
        code=f"unknown-{entry}",
    )


def target_positions(config: Mapping[str, Any]) -> int | None:
    """Positions that the decoder knows; None where there is no limit."""
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    limits = (config.get(name) for name in names)
    return next((limit for limit in limits if isinstance(limit, int)), None)


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
