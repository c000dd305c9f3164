"""The logits of a prompt and of some steps after it, held against another decoder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import GpuCheck, Phase
from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.decoding.decoder import Decoder
from exporter.pipeline.gpu.cases import TOKENS

BOTH: tuple[Phase, ...] = ("prefill", "decode")
_BATCH, _PROMPT, _STEPS = 2, 8, 8
RANGES = Ranges(batch=Span(1, _BATCH, _BATCH), prompt=Span(1, _PROMPT, _PROMPT))
"""What an engine serves that is asked."""

Answers = Mapping[Phase, NDArray[Any]]
"""By phase ``[steps, batch, vocabulary]``, float32."""


def answers(decoder: Decoder, room: int) -> Answers:
    """Runs prompts and steps of fixed random tokens.

    Args:
        decoder: Entered.
        room: Positions that a text may have.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, TOKENS, (_BATCH, _PROMPT))
    first = decoder.prefill(prompts, context=room)
    steps = [decoder.step(token) for token in rng.integers(0, TOKENS, (_STEPS, _BATCH, 1))]
    return {"prefill": first[None], "decode": np.stack(steps)}


def checks(found: Answers, wanted: Answers, tolerance: float, **facts: str) -> list[GpuCheck]:
    """A row for each phase.

    Args:
        found: What is looked at.
        wanted: What it is held against.
        tolerance: As a share of the largest logit.
        facts: ``subject`` and ``against``.
    """
    return [
        GpuCheck(
            phase=phase,
            largest_error=relative_error(found[phase], wanted[phase]),
            tolerance=tolerance,
            **facts,
        )
        for phase in BOTH
    ]


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The largest difference, as a share of the largest number that is wanted."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
