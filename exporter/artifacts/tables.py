"""Pruning at several depths: each way of dropping at each number, on the same held-out text."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from exporter.artifacts.accuracy import Interval, TaskResult
from exporter.artifacts.base import Artifact, Count, Length, Record
from exporter.artifacts.latency import Speedup, VerdictWord
from exporter.artifacts.stages import CalibrationRef, ModelRef, PlannedDeletion

Way = Literal["attention", "mlp", "block", "joint"]


class DepthDamage(Record):
    """What a cut costs on the held-out text, both models on the same tokens.

    ``perplexity_ratio`` is the cut model's perplexity over the whole one's, its interval None with
    fewer than two samples; ``kl`` in nats. ``perplexity_ratio_most`` is the upper end of
    an interval that is as much wider as the number of figures takes that a cut is chosen by.
    """

    gone = frozenset({"perplexity", "kl_ci95"})

    perplexity_ratio: float
    perplexity_ratio_ci95: tuple[float, float] | None
    perplexity_ratio_most: float | None = None
    kl: float
    top1_agreement: float


class DepthCell(Record):
    """One way of dropping at one number.

    ``healed`` is what is left with kept weights folded, ``speedup`` how many times faster costs
    foretell a request to be.
    """

    way: Way
    number: Count
    deletions: list[PlannedDeletion] = Field(default_factory=list)
    parameters_removed: float | None = None
    damage: DepthDamage | None = None
    healed: DepthDamage | None = None
    not_healed: str = ""
    speedup: float | None = None
    tasks: list[TaskResult] = Field(default_factory=list)
    refused: str | None = None

    @property
    def least(self) -> DepthDamage | None:
        """The lesser of both damages; None where nothing was measured."""
        damages = [damage for damage in (self.damage, self.healed) if damage is not None]
        return min(damages, key=lambda damage: damage.perplexity_ratio, default=None)


class DepthInt8(Record):
    """The whole model or the recommended cut in int8, beside the whole one on ONNX Runtime."""

    deletions: list[PlannedDeletion] = Field(default_factory=list)
    bytes_removed: float
    damage: DepthDamage
    speedup: Speedup | None = None


class DepthsReport(Artifact):
    """depths.json: Attention Drop, MLP Drop, Block Drop and Joint Layer Drop side by side.

    ``way`` and ``number`` name the recommended cell; ``reported`` is what that costs on
    ``reported_text``, which chose nothing. ``looks`` counts the figures that one is chosen by.
    ``int8`` has the whole model first, also on that text; without it ``no_int8`` says why.
    """

    model: ModelRef
    metric: str
    calibration: CalibrationRef
    text: CalibrationRef
    baseline_perplexity: float
    cells: list[DepthCell]
    fitted_on: CalibrationRef | None = None
    most_increase: float
    looks: Count = 1
    request: str = ""
    backend: str = ""
    threads: Length | None = None
    way: Way | None = None
    number: Count | None = None
    reported_text: CalibrationRef | None = None
    reported: DepthDamage | None = None
    int8: list[DepthInt8] = Field(default_factory=list)
    no_int8: str = ""

    @property
    def recommended(self) -> DepthCell | None:
        """The cell that is named."""
        wanted = self.way, self.number
        return next((cell for cell in self.cells if (cell.way, cell.number) == wanted), None)


CellStatus = Literal["done", "failed", "missing"]
"""``missing`` cells were not come to: the sweep was cut short, or only looked at."""


class SweepFailure(Record):
    """Why a cell has no result: the error's class, what it said, what to do."""

    error: str
    message: str
    hint: str | None = None


class SweepShape(Record):
    """One timed shape of a cell, in brief; the samples are in the cell's own report.json.

    ``name`` is short: ``decode at 512``. ``over_float`` is, for a quantised cell, how many times as
    fast the cut and quantised model is as the whole one in float.
    """

    gone = frozenset({"baseline_ms", "candidate_ms"})

    name: str
    rounds: Length
    speedup: Speedup
    verdict: VerdictWord
    over_float: Interval | None = None


class SweepResult(Record):
    """What a cell found: the cut model against the whole one.

    ``figures`` and ``whole_bytes`` are against the whole model in float, where a quantised cell's
    was measured beside it: by their keys the whole model's, None where it has none of its own, and
    the cut one's. ``machine`` is the processor, or the GPU where both ran on one.
    """

    deletions: list[PlannedDeletion]
    shapes: list[SweepShape]
    figures: dict[str, tuple[float | None, float]] = Field(default_factory=dict)
    whole_bytes: Count
    candidate_bytes: Count
    precision: str
    machine: str
    threads: Length
    notices: list[str] = Field(default_factory=list)


class SweepCell(Record):
    """One model with one plan in one precision.

    ``folder`` is relative to the sweep's. ``key`` is the hash of all that the cell depends on, but
    for the machine. ``seconds`` is what its last run took; ``report_sha256`` is of its report.json.
    """

    model: str
    plan: str
    precision: str
    folder: str
    key: str
    status: CellStatus
    seconds: float | None = None
    report_sha256: str | None = None
    result: SweepResult | None = None
    failure: SweepFailure | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, content: Any) -> Any:
        """Their results are read anew from the cell's report."""
        result = content.get("result") if isinstance(content, dict) else None
        if isinstance(result, dict) and "against_float" in result:
            return {**content, "status": "missing", "result": None}
        return content


class SweepReport(Artifact):
    """sweep.json; ``text`` is what the sweep's file holds."""

    gone = frozenset({"models", "plans", "precisions"})

    source: str
    text: str
    cells: list[SweepCell]

    def of_status(self, status: CellStatus) -> list[SweepCell]:
        """The cells that are done, failed or missing."""
        return [cell for cell in self.cells if cell.status == status]
