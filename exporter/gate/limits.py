"""How much worse a candidate may be, and how such limits are written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from exporter.errors import UsageError

_AMOUNT = re.compile(r"(?P<number>[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?)\s*(?P<percent>%)?", re.I)


@dataclass(frozen=True)
class Limits:
    """What is checked: each limit that isn't None.

    Attributes:
        max_slowdown: Share by which the candidate's time may grow: 0.03 is 3 %.
        min_speedup: Factor by which the candidate must be faster than its own unpruned arm.
        max_perplexity_increase: Share by which its perplexity may grow.
        max_kl: KL divergence from its unpruned arm, in nats per position.
        min_top1_agreement: Share of positions with the unpruned arm's most likely token.
        min_embedding_cosine: Mean cosine of an encoder's embeddings with the unpruned arm's.
        max_task_drop: Points of a task's score that it may lose: 0.01 is one of a hundred. A
            metric of which less is better may grow by as much.
        max_size_increase: Share by which its files and engines may grow.
        max_memory_increase: Share by which its KV cache and its device memory may grow.
        noise_floor: Factor within which a measured change is noise, where the session measured
            none of its own; the larger of both counts.
    """

    max_slowdown: float | None = None
    min_speedup: float | None = None
    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    min_top1_agreement: float | None = None
    min_embedding_cosine: float | None = None
    max_task_drop: float | None = None
    max_size_increase: float | None = None
    max_memory_increase: float | None = None
    noise_floor: float = 0.01

    def __post_init__(self) -> None:
        for name, value in self._given().items():
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{name.replace('_', '-')} is {value:g}; it begins at 0.")
        if self.min_speedup == 0:
            raise UsageError("min-speedup is a factor above 0, such as 1.1.")
        for name in ("min_top1_agreement", "min_embedding_cosine"):
            if (getattr(self, name) or 0) > 1:
                raise UsageError(f"{name.replace('_', '-')} is at most 1, or 100 %.")

    @property
    def empty(self) -> bool:
        """Whether nothing is limited."""
        return set(self._given()) == {"noise_floor"}

    def _given(self) -> dict[str, float]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


AGAINST_BASELINE = Limits(
    max_slowdown=0.03,
    max_perplexity_increase=0.01,
    max_size_increase=0.01,
    max_memory_increase=0.01,
)
"""What is checked against an earlier report where the caller names nothing."""


def amount(text: str | float) -> float:
    """Reads ``3%`` or ``0.03`` as 0.03; a number passes.

    Raises:
        UsageError: The text is neither.
    """
    if isinstance(text, int | float):
        return float(text)
    told = _AMOUNT.fullmatch(text.strip())
    if told is None:
        raise UsageError(f"{text!r} is no amount such as 3% or 0.03.")
    number = float(told["number"])
    return number / 100 if told["percent"] else number


def share(text: str | float) -> float:
    """Reads an amount that is a share; ``3`` is refused, since 3 % is meant and 300 % is not.

    Raises:
        UsageError: The text is no amount, or a number above 1 without a percent sign.
    """
    value = amount(text)
    if value > 1 and "%" not in str(text):
        raise UsageError(f"{text} is {100 * value:g} %.", f"Write {value:g}% or {value / 100:g}.")
    return value


def read_limit(name: str, text: str | float) -> float:
    """Reads one of :class:`Limits`' values: a share, but for factors and nats."""
    return amount(text) if name in ("min_speedup", "max_kl") else share(text)
