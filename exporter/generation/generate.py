"""The loop: prefill, then a token at a time, until the model ends or enough is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import BackendError, first_line
from exporter.generation.decoder import Decoder
from exporter.generation.sampling import Sampler, Sampling
from exporter.measure.model_folder import ModelFolder, read_object
from exporter.optional import require

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
) -> Generation:
    """Generates from one prompt.

    Args:
        decoder: A loaded decoder.
        prompt_ids: At least one token.
        new_tokens: The most tokens to generate, at least one.
        stop_ids: Tokens that end the text.
        sampling: How tokens are chosen.

    Raises:
        BackendError: The prompt is empty, or the decoder fails.
    """
    if not prompt_ids:
        raise BackendError("The prompt holds no token.", "Give it some text.")
    stream = _tokens(decoder, prompt_ids, Sampler(sampling))
    begin = time.perf_counter()
    found: list[int] = []
    times: list[float] = []
    for token in stream:
        times.append(time.perf_counter())
        if token in stop_ids:
            break
        found.append(token)
        if len(found) == new_tokens:
            break
    later = (times[-1] - times[0]) / (len(times) - 1) * 1e3 if len(times) > 1 else None
    ended = len(times) > len(found)
    return Generation(tuple(found), ended, (times[0] - begin) * 1e3, later)


def _tokens(decoder: Decoder, prompt_ids: list[int], sampler: Sampler) -> Iterator[int]:
    logits = decoder.prefill(np.array([prompt_ids], np.int64))
    while True:
        token = sampler.choose(logits)
        yield int(token[0])
        logits = decoder.step(token[:, None])


@dataclass(frozen=True)
class TextModel:
    """A folder's tokenizer, and the tokens that end its texts."""

    tokenizer: Path
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, folder: ModelFolder) -> TextModel:
        """Reads what stands beside the model.

        Raises:
            BackendError: There is no tokenizer.
            ComparisonError: A config is no JSON object.
        """
        if folder.tokenizer is None:
            raise BackendError(
                f"There is no tokenizer.json beside {folder.onnx}.",
                "Copy the model's tokenizer there.",
            )
        # Chat models often end a turn with a token of which only the generation config knows.
        generation = read_object(folder.onnx.parent / "generation_config.json")
        ends = generation.get("eos_token_id", folder.config.get("eos_token_id"))
        return cls(folder.tokenizer, frozenset(_numbers(ends)))

    def encode(self, text: str) -> list[int]:
        """The text's tokens."""
        ids: list[int] = self._loaded().encode(text).ids
        return ids

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """The tokens' text."""
        text: str = self._loaded().decode(list(token_ids))
        return text

    def _loaded(self) -> Any:
        module = require("tokenizers", extra="cpu")
        try:
            return module.Tokenizer.from_file(str(self.tokenizer))
        except Exception as error:  # the library raises no class of its own
            raise BackendError(
                f"{self.tokenizer} is no tokenizer ({first_line(error)}).",
                "Copy the model's tokenizer there again.",
            ) from error


def _numbers(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int)]
