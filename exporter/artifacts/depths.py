"""Pruning at several depths: each way of dropping at each number, on the same held-out text.

And how much may be dropped: the same with speed, a second domain and healing, one recommended.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.accuracy import TaskResult
from exporter.artifacts.base import Artifact, Count, Length, Record
from exporter.artifacts.stages import CalibrationRef, ModelRef, PlannedDeletion

Way = Literal["attention", "mlp", "block", "joint"]


class DepthDamage(Record):
    """What a cut costs on the held-out text, both models on the same tokens.

    ``perplexity_ratio`` is the cut model's perplexity over the whole one's; ``kl`` in nats. Their
    intervals are None with fewer than two samples. ``perplexity_ratio_most`` is the upper end of
    an interval that is as much wider as the number of figures takes that a cut is chosen by.
    """

    perplexity: float
    perplexity_ratio: float
    perplexity_ratio_ci95: tuple[float, float] | None
    perplexity_ratio_most: float | None = None
    kl: float
    kl_ci95: tuple[float, float] | None
    top1_agreement: float


class DepthCell(Record):
    """One way of dropping at one number.

    ``refused`` says why there is nothing to measure; the rest is then empty.
    ``parameters_removed`` is the share of the model's that goes with the sublayers, without their
    norms. ``damage`` is that on the held-out text, ``other`` that in the other domain; ``healed``
    and ``other_healed`` are the same with folded weights, and ``not_healed`` says why there are
    none. ``speedups`` has how many times faster than the whole model it is, by ``prefill``,
    ``decode`` and ``request``.
    """

    way: Way
    number: Count
    deletions: list[PlannedDeletion] = Field(default_factory=list)
    parameters_removed: float | None = None
    damage: DepthDamage | None = None
    other: DepthDamage | None = None
    healed: DepthDamage | None = None
    other_healed: DepthDamage | None = None
    not_healed: str = ""
    speedups: dict[str, float] = Field(default_factory=dict)
    tasks: list[TaskResult] = Field(default_factory=list)
    refused: str | None = None


class DepthsInt8(Record):
    """The whole model with its weights in int8, beside the cuts, on ONNX Runtime.

    ``bytes_removed`` is the share of its files that goes. The ratios are its perplexity over the
    float model's, on the held-out text and in the other domain. ``speedups`` as those of a cell.
    """

    bytes_removed: float
    perplexity_ratio: float
    other_perplexity_ratio: float
    speedups: dict[str, float]


class DropAnswer(Record):
    """How much may be dropped: on what else the cells were judged, and which one is recommended.

    ``fitted_on`` is the text that folded weights were fitted on; ``most_increase`` the share by
    which the perplexity on the held-out text may rise. ``request`` was timed on ``backend`` with
    ``threads``; all three are empty where nothing could be. ``int8`` is None where no graph could
    be written; ``no_int8`` then says why. ``way`` and ``number`` name the recommended cell; None:
    none keeps the limit, or is faster. It was chosen by ``looks`` figures on the report's text;
    ``reported`` is its damage on ``reported_text``, other documents, which chose nothing.
    """

    other_text: CalibrationRef
    other_baseline_perplexity: float
    fitted_on: CalibrationRef
    most_increase: float
    request: str = ""
    backend: str = ""
    threads: Length | None = None
    int8: DepthsInt8 | None = None
    no_int8: str = ""
    way: Way | None = None
    number: Count | None = None
    looks: Count = 1
    reported_text: CalibrationRef | None = None
    reported: DepthDamage | None = None


class DepthsReport(Artifact):
    """depths.json: Attention Drop, MLP Drop, Block Drop and Joint Layer Drop side by side.

    ``answer`` is None where only damage was asked for.
    """

    kind: Literal["depths_report"] = "depths_report"
    model: ModelRef
    metric: str
    calibration: CalibrationRef
    text: CalibrationRef
    baseline_perplexity: float
    cells: list[DepthCell]
    answer: DropAnswer | None = None

    @property
    def recommended(self) -> DepthCell | None:
        """The cell that the answer names."""
        wanted = (None, None) if self.answer is None else (self.answer.way, self.answer.number)
        return next((cell for cell in self.cells if (cell.way, cell.number) == wanted), None)

    @property
    def numbers(self) -> list[int]:
        """The depths, rising."""
        return sorted({cell.number for cell in self.cells})

    def of_way(self, way: Way) -> list[DepthCell]:
        """The cells of one way of dropping, in the order of their numbers."""
        return sorted((c for c in self.cells if c.way == way), key=lambda cell: cell.number)
