"""A request, what it takes, and what each sublayer's removal saves of it: costs.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Self

from pydantic import Field

from exporter.artifacts import FEWEST_ROUNDS, Artifact, Environment, LatencyRow, Record
from exporter.artifacts.base import Layer
from exporter.artifacts.latency import Shape
from exporter.errors import CostError, UsageError
from exporter.option_types import Written, parsed
from graph_passes.types import Replacement, SublayerKind, SublayerRef

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


class SublayerCost(Record):
    """What cutting one sublayer saves of the request, by what takes its place."""

    layer: Layer
    kind: SublayerKind
    saved_ms: dict[Replacement, float]

    @property
    def name(self) -> SublayerRef:
        """Layer and kind."""
        return SublayerRef(self.layer, self.kind)


class Variant(Record):
    """Sublayers that were cut together, what that saved, between which ends, and the raw times."""

    sublayers: list[SublayerRef]
    saved_ms: float
    ci95_ms: tuple[float, float]
    rows: list[LatencyRow] = Field(min_length=1)

    @property
    def is_resolved(self) -> bool:
        """Whether enough rounds show that something is saved."""
        return self.ci95_ms[0] > 0 and min(row.rounds for row in self.rows) >= FEWEST_ROUNDS


class CostTable(Artifact):
    """costs.json.

    ``at`` is the request, ``backend`` and ``provider`` what ran it. ``baseline_ms`` is what the
    request takes with the whole model, ``runs`` what single runs of it took. ``rates`` are
    milliseconds for each part of the work.
    """

    at: RequestShape
    backend: str
    provider: str
    environment: Environment
    baseline_ms: float = Field(gt=0)
    runs: dict[str, float] = Field(default_factory=dict)
    rates: dict[str, float] = Field(default_factory=dict)
    sublayers: list[SublayerCost]
    variants: list[Variant] = Field(default_factory=list)

    @property
    def names(self) -> list[SublayerRef]:
        """Layer and kind of every sublayer whose cost is known."""
        return [one.name for one in self.sublayers]

    def saved_ms(self, name: SublayerRef, replacement: Replacement = "none") -> float:
        """Milliseconds of the request that one sublayer's removal saves.

        Below 0 where the replacement takes longer than what it replaces.
        """
        for one in self.sublayers:
            if one.name == tuple(name) and replacement in one.saved_ms:
                return one.saved_ms[replacement]
        raise CostError(
            f"The cost of {name[1]} {name[0]} with the replacement {replacement!r} is not known.",
            "Make the table again: depthcut costs.",
            code="not-measured",
        )

    def speedup(self, choices: Mapping[Any, Replacement]) -> float | None:
        """How many times faster the request is foretold to be, as far as savings add up.

        None where costs don't tell it, or can't be right: nothing would be left of the request.
        """
        try:
            saved = math.fsum(self.saved_ms(name, how) for name, how in choices.items())
        except CostError:
            return None
        left = self.baseline_ms - saved
        return self.baseline_ms / left if left > 0 else None
