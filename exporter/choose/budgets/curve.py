"""The whole Pareto front: what every gain costs at least, as far as the search finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.artifacts import CurvePoint, ParetoCurve
from exporter.choose.budgets.gains import Parameters
from exporter.choose.budgets.walk import Judge, Walk
from exporter.choose.costs import CostTable, GraphSizes

if TYPE_CHECKING:
    from exporter.artifacts import ImportanceReport
    from exporter.score import CalibrationText

ENOUGH_NATS = 3.0
"""The search ends there: the answers then have next to nothing in common with the model's."""


def curve_of(
    walks: Sequence[Walk],
    judge: Judge,
    sizes: GraphSizes,
    costs: CostTable | None,
    rank: int | None,
    *,
    report: ImportanceReport,
    text: CalibrationText,
) -> ParetoCurve:
    """Measures walks on held-out tokens, and marks those that nothing else beats.

    Args:
        walks: At least one.
        judge: Holds the tokens.
        sizes: Of the sublayers.
        costs: Their times; None where none are known.
        rank: Of linear maps.
        report: Names the model.
        text: What the judge holds.
    """
    parameters = Parameters(sizes, rank)
    points = []
    for walk in walks:
        damage = judge.damage(walk)
        points.append(
            CurvePoint(
                deletions=walk.deletions,
                speedup=None if costs is None else costs.speedup(walk.choices),
                parameters_removed=walk.gain(parameters) / parameters.whole,
                kl=damage.kl,
                kl_std_error=damage.kl_std_error,
                log_perplexity_increase=damage.log_perplexity_increase,
                log_perplexity_increase_std_error=damage.log_perplexity_increase_std_error,
                top1_agreement=damage.top1_agreement,
            )
        )
    points.sort(key=gain_of)
    made_from = {"model": report.model.sha256, "calibration": text.ref.sha256}
    return ParetoCurve(
        model=report.model,
        calibration=text.ref,
        at=None if costs is None else str(costs.at),
        points=[p.model_copy(update={"on_front": _leads(p, points)}) for p in points],
        made_from=made_from,
    )


def gain_of(point: CurvePoint) -> float:
    """The speedup; without one the share of the parameters that goes."""
    return point.parameters_removed if point.speedup is None else point.speedup


def _leads(point: CurvePoint, points: Sequence[CurvePoint]) -> bool:
    return not any(
        other.kl <= point.kl and gain_of(other) >= gain_of(point)
        and (other.kl, gain_of(other)) != (point.kl, gain_of(point))
        for other in points
    )  # fmt: skip
