"""Pruning at several depths: each way of dropping at each number, on the same held-out text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.accuracy import TaskResult
from exporter.artifacts.base import Artifact, Record
from exporter.artifacts.stages import CalibrationRef, ModelRef, PlannedDeletion

Way = Literal["attention", "mlp", "block", "joint"]


class DepthDamage(Record):
    """What a cut costs on the held-out text, both models on the same tokens.

    ``perplexity_ratio`` is the cut model's perplexity over the whole one's; ``kl`` in nats. Their
    intervals are None with fewer than two samples.
    """

    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_ci95: tuple[float, float] | None
    kl: float
    kl_ci95: tuple[float, float] | None
    top1_agreement: float


class DepthCell(Record):
    """One way of dropping at one number.

    ``refused`` says why there is nothing to measure; the rest is then empty.
    ``parameters_removed`` is the share of the model's that goes with the sublayers, without their
    norms.
    """

    way: Way
    number: int
    deletions: list[PlannedDeletion] = Field(default_factory=list)
    parameters_removed: float | None = None
    damage: DepthDamage | None = None
    tasks: list[TaskResult] = Field(default_factory=list)
    refused: str | None = None


class DepthsReport(Artifact):
    """depths.json: Attention Drop, MLP Drop, Block Drop and Joint Layer Drop side by side."""

    kind: Literal["depths_report"] = "depths_report"
    model: ModelRef
    metric: str
    calibration: CalibrationRef
    text: CalibrationRef
    baseline_perplexity: float
    cells: list[DepthCell]

    @property
    def numbers(self) -> list[int]:
        """The depths, rising."""
        return sorted({cell.number for cell in self.cells})

    def of_way(self, way: Way) -> list[DepthCell]:
        """The cells of one way of dropping, in the order of their numbers."""
        return sorted((c for c in self.cells if c.way == way), key=lambda cell: cell.number)
