"""sweep.json: one table of all cells of a sweep."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.accuracy import Interval, PerplexityPair
from exporter.artifacts.base import Artifact, Count, Length, Record
from exporter.artifacts.latency import Speedup, TimedPhase, VerdictWord
from exporter.artifacts.stages import PlannedDeletion

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

    name: str
    phase: TimedPhase
    batch: Length
    sequence_length: Length
    past_length: Length
    new_tokens: Length = 0
    rounds: Length
    baseline_ms: float
    candidate_ms: float
    speedup: Speedup
    verdict: VerdictWord
    over_float: Interval | None = None


class AgainstFloat(Record):
    """A quantised cell's cut model against the whole one in float, which was measured beside it."""

    whole_bytes: Count
    whole_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None


class SweepResult(Record):
    """What a cell found: the cut model against the whole one, both in the cell's precision.

    ``against_float`` is None where that precision is a float's. ``machine`` is the processor, or
    the GPU where both ran on one.
    """

    deletions: list[PlannedDeletion]
    shapes: list[SweepShape]
    perplexity: PerplexityPair | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    baseline_bytes: Count
    candidate_bytes: Count
    baseline_parameters: Count
    candidate_parameters: Count
    baseline_kv_bytes_per_token: Count
    candidate_kv_bytes_per_token: Count
    against_float: AgainstFloat | None = None
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


class SweepReport(Artifact):
    """sweep.json. The names stand in the order of the sweep's file, ``text`` is what it holds."""

    kind: Literal["sweep_report"] = "sweep_report"
    source: str
    text: str
    models: list[str]
    plans: list[str]
    precisions: list[str]
    cells: list[SweepCell]

    def of_status(self, status: CellStatus) -> list[SweepCell]:
        """The cells that are done, failed or missing."""
        return [cell for cell in self.cells if cell.status == status]
