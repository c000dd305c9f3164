"""How far rankings of one model's sublayers agree: of two score files, or of a series of them."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import Field

from exporter.artifacts.base import Artifact, Record
from exporter.artifacts.stages import CalibrationRef, ModelRef
from graph_passes.types import DeletionKind

Over = Literal["checkpoints", "texts"]


class RankCorrelation(Record):
    """How far two rankings of sublayers of one kind agree.

    ``spearman`` and ``kendall`` (tau-b) are 1 for the same order and -1 for the opposite; None
    where one of the rankings can't tell its sublayers apart. ``shared_first`` tells for some n how
    many sublayers are among the n most redundant in both.
    """

    spearman: float | None
    kendall: float | None
    shared_first: dict[int, int]


class RankingRef(Record):
    """A metric of one of the files; ``file`` is a key of the comparison's ``texts``."""

    metric: str
    file: str


class RankAgreement(RankCorrelation):
    """Two metrics' or files' rankings of sublayers of one kind."""

    kind: DeletionKind
    first: RankingRef
    second: RankingRef
    sublayers: int


class ScoreComparison(Artifact):
    """What `depthcut score` tells of two importance.json of one model."""

    kind: Literal["score_comparison"] = "score_comparison"
    model: ModelRef
    texts: dict[str, CalibrationRef]
    agreements: list[RankAgreement]


class StabilityPoint(Record):
    """One score file of the series.

    ``step`` is the training step that the checkpoint's name tells, or the number of tokens where
    texts differ in nothing else; None where there is no such number.
    """

    label: str
    step: float | None
    file: str
    model: ModelRef
    calibration: CalibrationRef


class SeriesAgreement(RankCorrelation):
    """Two points of a series, by their places in it."""

    first: int
    second: int


class KindStability(Record):
    """One kind of sublayer: its scores, point by point, and how far each two points agree.

    ``scores`` is ``[points][layers]``, in the order of ``layers``. ``repeatability`` is point by
    point the correlation (Spearman's) that the same model would have on other text of that kind
    and size, by the scores' standard errors; None where they aren't known. ``always_first`` has for
    some n the layers that are among the n most redundant at every point.
    """

    kind: DeletionKind
    layers: list[int]
    scores: list[list[float]]
    repeatability: list[float | None]
    agreements: list[SeriesAgreement]
    always_first: dict[int, list[int]]

    def between(self, first: int, second: int) -> SeriesAgreement:
        """Of two different points, in either order."""
        wanted = min(first, second), max(first, second)
        return next(a for a in self.agreements if (a.first, a.second) == wanted)


class StabilityReport(Artifact):
    """stability.json; ``points`` are in the order of the series."""

    kind: Literal["stability_report"] = "stability_report"
    over: Over
    metric: str
    points: list[StabilityPoint] = Field(min_length=2)
    kinds: list[KindStability]

    @property
    def is_ordered(self) -> bool:
        """Whether the points stand on an axis: each has a step, and they rise."""
        steps = [point.step for point in self.points]
        known = [step for step in steps if step is not None]
        return len(known) == len(steps) and all(
            one < other for one, other in itertools.pairwise(known)
        )
