"""What all plans of one search gain and cost, for a plot and for whoever chooses among them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.base import Artifact, Record
from exporter.artifacts.stages import CalibrationRef, ModelRef, PlannedDeletion


class CurvePoint(Record):
    """One plan.

    ``speedup`` is what the measured costs foretell, None without costs; ``parameters_removed`` a
    share of the model's. The damage is that on held-out tokens, in nats, with its standard error
    over samples. ``on_front`` says that no other point gains as much for less KL divergence.
    """

    deletions: list[PlannedDeletion]
    speedup: float | None
    parameters_removed: float
    kl: float
    kl_std_error: float | None
    log_perplexity_increase: float
    log_perplexity_increase_std_error: float | None
    top1_agreement: float
    on_front: bool = False


class ParetoCurve(Artifact):
    """A Pareto front and the plans that it was found among, the smallest first.

    ``at`` is the request that speedups are for; ``calibration`` is the held-out text.
    """

    kind: Literal["pareto_curve"] = "pareto_curve"
    model: ModelRef
    calibration: CalibrationRef
    at: str | None = None
    points: list[CurvePoint] = Field(min_length=1)

    @property
    def front(self) -> list[CurvePoint]:
        """The points that nothing else beats."""
        return [point for point in self.points if point.on_front]
