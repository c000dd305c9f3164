"""What an encoder-decoder's configs say of generation: how a target begins and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from exporter.errors import ModelSourceError
from exporter.models.model_folder import read_object, token_ids
from exporter.optional import require

_S = TypeVar("_S")
_M = TypeVar("_M", bound=BaseModel)
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]
_Many = Field(max_length=1 << 14)  # each is looked at for each token of an answer
Step = Callable[[_S, NDArray[np.int64]], tuple[NDArray[Any], _S]]
"""From a decoder's state and further tokens ``[batch, tokens]`` to the last token's logits
``[batch, vocabulary]``, and the state after them."""


_Length = Annotated[int, Field(ge=0, lt=1 << 31)]
_Words = Annotated[list[_Token], Field(min_length=1, max_length=1 << 10)]


class _Settings(BaseModel):
    """What configs say of targets and of which tokens may come; null where they don't."""

    model_config = ConfigDict(strict=True)

    decoder_start_token_id: _Token | None = None
    eos_token_id: _Token | Annotated[list[_Token], _Many] | None = None
    pad_token_id: _Token | None = None
    suppress_tokens: Annotated[list[_Token], _Many] | None = None
    begin_suppress_tokens: Annotated[list[_Token], _Many] | None = None
    forced_bos_token_id: _Token | None = None
    forced_decoder_ids: list[Annotated[tuple[int, _Token | None], Strict(strict=False)]] | None = (
        None
    )
    no_timestamps_token_id: _Token | None = None
    lang_to_id: dict[str, _Token] | None = None
    task_to_id: dict[str, _Token] | None = None
    language: str | None = None
    task: str | None = None
    bad_words_ids: Annotated[list[_Words], _Many] | None = None
    no_repeat_ngram_size: _Length | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    min_length: _Length | None = None
    min_new_tokens: _Length | None = None
    max_length: _Length | None = None
    max_new_tokens: _Length | None = None
    forced_eos_token_id: _Token | Annotated[list[_Token], _Many] | None = None


_USUAL_LENGTH = 20
"""``max_length`` as transformers 4 has it where nobody says one."""


_ELSEWHERE: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "do_sample": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
    "force_words_ids": (),
    "constraints": (),
}
"""Settings that other libraries generate by and greedy answers here don't heed, with the values
that change nothing."""


def settings_of(kind: type[_M], content: Mapping[str, Any], where: str) -> _M:
    """Entries of a model's JSON file, checked."""
    try:
        return kind.model_validate(dict(content))
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
    """How targets are generated, greedily."""

    prompt: tuple[int, ...]
    end_ids: frozenset[int]
    pad_id: int
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    never_in_row: tuple[tuple[int, ...], ...] = ()
    no_repeat: int = 0
    penalty: float = 1.0
    fewest: int = 0
    longest: int | None = None  # None: no limit is named
    last: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> DecodingRules:
        """Those of a model's ``config.json`` and ``generation_config.json``.

        A speech model's language is that of its generation config, else English; it is told as
        transformers takes it: ``de``, ``<|de|>`` or ``german``.
        """
        given = {name: value for name, value in generation.items() if value is not None}
        where = "config.json or generation_config.json"
        result = settings_of(_Settings, {**config, **given}, where)
        # As in transformers: where generation has a file, the model's says nothing of it.
        said = {name: value for name, value in (generation or config).items() if value is not None}
        steering = settings_of(_Settings, said, where)
        start = result.decoder_start_token_id
        if start is None:
            raise _unsaid("with which token a target begins", "decoder_start_token_id")
        ends, pad, forced = token_ids(result.eos_token_id), result.pad_token_id, _forced(result)
        own = 1 + len(forced) * (result.forced_bos_token_id is None)
        longest = None if steering.max_length == _USUAL_LENGTH else steering.max_length
        if steering.max_new_tokens is not None:
            longest = own + steering.max_new_tokens
        words = (tuple(row) for row in steering.bad_words_ids or ())
        return cls(
            prompt=(start, *forced),
            end_ids=frozenset(ends),
            pad_id=next(iter(ends), 0) if pad is None else pad,
            never=tuple(result.suppress_tokens or ()),
            never_first=tuple(result.begin_suppress_tokens or ()),
            never_in_row=tuple(row for row in words if row not in {(end,) for end in ends}),
            no_repeat=steering.no_repeat_ngram_size or 0,
            penalty=steering.repetition_penalty or 1.0,
            fewest=max(steering.min_length or 0, own + (steering.min_new_tokens or 0)),
            longest=longest,
            last=tuple(token_ids(steering.forced_eos_token_id)),
            ignored=tuple(
                f"{name} {said[name]}"
                for name, idle in _ELSEWHERE.items()
                if name in said and said[name] not in idle
            ),
        )

    def room(self, most: int) -> int:
        """How many of so many tokens the configs let come behind the prompt; at least one."""
        return max(1, most if self.longest is None else min(most, self.longest - len(self.prompt)))

    def weigh(self, logits: NDArray[np.float32], so_far: NDArray[np.int64]) -> None:
        """Makes tokens that may not come next impossible, and repeated ones less likely.

        As transformers' processors of logits do: ``RepetitionPenalty``, ``NoRepeatNGram``,
        ``NoBadWords``, ``MinLength``, ``ForcedEOSToken``, ``SuppressTokens``,
        ``SuppressTokensAtBegin``.
        """
        begins, short = so_far.shape[1] == len(self.prompt), so_far.shape[1] < self.fewest
        never = {*self.never, *(self.never_first if begins else ())}
        never |= self.end_ids if short else frozenset()
        ends = so_far.shape[1] + 1 == self.longest
        for row, item in zip(logits, so_far.tolist(), strict=True):
            if self.penalty != 1:
                seen = [token for token in {*item} if token < len(row)]
                result = row[seen]
                row[seen] = np.where(result < 0, result * self.penalty, result / self.penalty)
            if ends and self.last:  # whatever else forbids them
                row[:] = -np.inf
                row[[token for token in self.last if token < len(row)]] = 0
                continue
            banned = never | self._completing(item)
            row[[token for token in banned if token < len(row)]] = -np.inf

    def _completing(self, items: list[int]) -> set[int]:
        """Tokens that would complete a sequence that may not come, or not once more."""
        numbers = {row[-1] for row in self.never_in_row if _ends_with(items, row[:-1])}
        size = self.no_repeat
        if 0 < size <= len(items):
            last = items[len(items) - size + 1 :]
            windows = (items[at : at + size] for at in range(len(items) - size + 1))
            numbers |= {window[-1] for window in windows if window[:-1] == last}
        return numbers


def rules_in(folder: Path) -> DecodingRules:
    """Those of an exported model."""
    configs = (read_object(folder / name) for name in ("config.json", "generation_config.json"))
    return DecodingRules.of(*configs)


def _ends_with(numbers: list[int], row: tuple[int, ...]) -> bool:
    return len(row) < len(numbers) and tuple(numbers[len(numbers) - len(row) :]) == row


def _forced(value: _Settings) -> list[int]:
    """What comes behind the start token whatever the source is."""
    pairs = sorted(pair for pair in value.forced_decoder_ids or () if pair[1] is not None)
    tokens = [value.forced_bos_token_id]
    if value.lang_to_id and value.task_to_id:
        task = value.task or "transcribe"
        if task not in value.task_to_id:
            raise _unsaid(f"the task {task}", "task")
        tokens = [_language(value.language, value.lang_to_id), value.task_to_id[task]]
    elif [place for place, _ in pairs] != [*range(1, len(pairs) + 1)]:
        raise _unsaid("every token behind the start token", "forced_decoder_ids")
    elif pairs:
        tokens = [token for _, token in pairs]
    untimed = value.no_timestamps_token_id
    return [token for token in dict.fromkeys([*tokens, untimed]) if token is not None]


def _language(text: str | None, tokens: Mapping[str, int]) -> int:
    """A language's token; it is told as ``de``, ``<|de|>`` or ``german``."""
    language = (text or "en").lower()
    for name in (language, f"<|{language}|>"):
        if name in tokens:
            return tokens[name]
    names = require("transformers.models.whisper.tokenization_whisper", extra="torch")
    token = tokens.get(f"<|{names.TO_LANGUAGE_CODE.get(language)}|>")
    if token is None:
        raise _unsaid(f"the language {language}, but {', '.join(tokens)}", "language")
    return token


def _unsaid(what: str, entry: str) -> ModelSourceError:
    return ModelSourceError(
        f"The model's configs don't say {what}.",
        f"Set {entry} in generation_config.json.",
        code="odd-setting",
    )


def target_positions(config: Mapping[str, Any]) -> int | None:
    """Positions that the decoder knows; None where there is no limit, as of relative ones (T5)."""
    if "relative_attention_num_buckets" in config:  # n_positions is what it was trained on
        return None
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    limits = (config.get(name) for name in names)
    return next((limit for limit in limits if isinstance(limit, int)), None)


def greedy(
    step: Step[_S], state: _S, rules: DecodingRules, batch: int, new_tokens: int
) -> NDArray[np.int64]:
    """Generates targets, at each step the likeliest token."""
    tokens = np.tile(np.array(rules.prompt, np.int64), (batch, 1))
    arrays, done = [tokens], np.zeros(batch, np.bool_)
    for _ in range(new_tokens):
        logits, state = step(state, tokens)
        last = np.array(logits, np.float32)
        rules.weigh(last, np.concatenate(arrays, axis=1))
        tokens = np.where(done, rules.pad_id, last.argmax(axis=-1))[:, None].astype(np.int64)
        arrays.append(tokens)
        done |= np.isin(tokens[:, 0], list(rules.end_ids))
        if done.all():
            break
    return np.concatenate(arrays, axis=1)
