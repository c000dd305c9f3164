"""The request for whose time a model is made faster: a prompt, and tokens after it."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, Self

from exporter.artifacts.latency import Shape
from exporter.errors import CostError, UsageError
from exporter.option_types import Written, parsed

_PART = re.compile(r"\s*(?P<key>\w+)\s*=\s*(?P<number>[+-]?\d+)\s*")
_HINT = "Write it as batch=1,prompt=512,new=128."


@dataclass(frozen=True)
class RequestShape:
    """A request: its time is that of one prefill of the prompt and of ``new`` decode steps."""

    batch: int = 1
    prompt: int = 512
    new: int = 128

    def __post_init__(self) -> None:
        if min(self.batch, self.prompt, self.new + 1) < 1:
            raise UsageError(
                f"{self} is no request: batch and prompt must be at least 1, and new 0.",
                _HINT,
                code="malformed-request",
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``batch=1,prompt=512,new=128``; what isn't named is as it is there."""
        known = [field.name for field in fields(cls)]
        matches = [_PART.fullmatch(part) for part in text.split(",")]
        numbers = {match["key"]: int(match["number"]) for match in matches if match is not None}
        if len(numbers) < len(matches) or not {*numbers} <= {*known}:
            raise UsageError(
                f"{text!r} is no request: it has {', '.join(known)}, each at most once.",
                _HINT,
                code="malformed-request",
            )
        return cls(**numbers)

    @property
    def longest(self) -> int:
        """Positions that the request reaches."""
        return self.prompt + self.new

    def __str__(self) -> str:
        return f"batch={self.batch},prompt={self.prompt},new={self.new}"

    def cells(self, *, cached: bool) -> list[tuple[Shape, float]]:
        """What is timed, and how often each counts in the request.

        Decode steps are timed at the shortest and the longest cache, each for half of them: a step
        takes longer in proportion to the cache.
        """
        if not cached:
            if self.new:
                raise CostError(
                    f"The graph has no KV cache, so it can't decode {self.new} new tokens.",
                    "Ask for its input alone: batch=1,prompt=512,new=0.",
                    code="no-kv-cache",
                )
            return [(Shape("encode", self.batch, self.prompt), 1.0)]
        pasts = sorted({self.prompt, self.longest - 1}) if self.new else []
        steps = [Shape("decode", self.batch, 1, past) for past in pasts]
        prefill = Shape("prefill", self.batch, self.prompt)
        return [(prefill, 1.0), *((step, self.new / len(steps)) for step in steps)]


RequestShapeOption = Annotated[RequestShape, parsed(RequestShape.parse), Written("REQUEST")]
"""As an option: ``batch=1,prompt=512,new=128``."""
