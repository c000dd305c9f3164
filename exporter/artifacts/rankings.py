"""How far rankings of one model's sublayers agree."""

from __future__ import annotations

from typing import Literal

from exporter.artifacts.base import Artifact, Record
from exporter.artifacts.stages import CalibrationRef, ModelRef
from graph_passes.types import DeletionKind


class RankingRef(Record):
    """A metric of one of the files; ``file`` is a key of the comparison's ``texts``."""

    metric: str
    file: str


class RankAgreement(Record):
    """Two rankings of sublayers of one kind.

    ``spearman`` and ``kendall`` (tau-b) are 1 for the same order and -1 for the opposite; None
    where one of the rankings can't tell its sublayers apart. ``shared_first`` tells for some n how
    many sublayers are among the n most redundant in both.
    """

    kind: DeletionKind
    first: RankingRef
    second: RankingRef
    sublayers: int
    spearman: float | None
    kendall: float | None
    shared_first: dict[int, int]


class ScoreComparison(Artifact):
    """What `depthcut score` tells of two importance.json of one model."""

    kind: Literal["score_comparison"] = "score_comparison"
    model: ModelRef
    texts: dict[str, CalibrationRef]
    agreements: list[RankAgreement]
