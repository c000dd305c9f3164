"""costs.json: what a request takes, and what each sublayer's removal saves of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from exporter.artifacts import FEWEST_ROUNDS, Artifact, Environment, LatencyRow, Record
from exporter.artifacts.base import Layer
from exporter.choose.costs.request_shape import RequestShape
from exporter.errors import CostError
from graph_passes.types import Replacement, SublayerKind, SublayerRef


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

    kind: Literal["cost_table"] = "cost_table"
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
