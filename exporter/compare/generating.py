"""Whole generations as they are timed: time to first token, time per token, and all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import TimedPhase
from exporter.artifacts.nouns import Parts
from exporter.compare.timing.clock import Clock
from exporter.compare.timing.subjects import Builds, Probe, Sample, TimedCell
from exporter.engines.decoding.decoder import Decoder
from exporter.errors import BackendError


@dataclass(frozen=True)
class GenerationCell:
    """A prompt's length, and how many tokens are generated; see ``timing.subjects.TimedCell``.

    Both arms generate as many: tokens that end a text don't.
    """

    batch: int
    sequence_length: int
    new_tokens: int
    past_length: int = 0
    counts: Parts = "tokens"

    @property
    def phases(self) -> tuple[TimedPhase, ...]:
        """Time to the first token, mean time of a later one, and of all of it."""
        return ("first_token", "per_token", "generate")

    @property
    def total_length(self) -> int:
        """Positions that a generation reaches."""
        return self.sequence_length + self.new_tokens

    def __str__(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"generate {self.new_tokens} after {self.sequence_length}{batch}"


class GenerationProbe:
    """Generates greedily from the same prompt each time.

    Args:
        decoder: Loaded.
        prompt: ``[batch, sequence]``.
        new_tokens: Two at least.
    """

    def __init__(self, decoder: Decoder, prompt: NDArray[np.int64], new_tokens: int) -> None:
        self._decoder = decoder
        self._prompt = prompt
        self._new_tokens = new_tokens

    def sample(self, clock: Clock) -> Sample:
        """Generates once.

        Raises:
            BackendError: The run fails, or the logits hold NaN.
        """
        decoder = self._decoder
        begin = clock()
        context = self._prompt.shape[1] + self._new_tokens
        logits = decoder.prefill(self._prompt, context=context)
        token = logits.argmax(axis=-1)
        first = clock()
        for _ in range(self._new_tokens - 1):
            logits = decoder.step(token[:, None])
            token = logits.argmax(axis=-1)
        end = clock()
        if np.isnan(logits).any():
            raise BackendError("The model gives NaN logits, so there is no next token.")
        later = (end - first) / (self._new_tokens - 1)
        return ((first - begin) / 1e6, later / 1e6, (end - begin) / 1e6)


class DecoderArm(Builds[Decoder]):
    """An arm that generates.

    Args:
        builds: Decoders of the same model, none of them loaded.
        vocabulary: How many tokens the model knows.
    """

    def __init__(self, builds: Sequence[Decoder], vocabulary: int) -> None:
        super().__init__(builds)
        self._vocabulary = vocabulary

    def probe(self, cell: TimedCell) -> Probe:
        """Binds the same random prompt for every arm."""
        size = (cell.batch, cell.sequence_length)
        prompt = np.random.default_rng(0).integers(0, self._vocabulary, size, dtype=np.int64)
        return GenerationProbe(self.current, prompt, cell.new_tokens)
