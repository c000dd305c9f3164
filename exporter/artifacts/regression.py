"""What the gate reads and writes: checks with their verdicts, the history."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.base import Artifact, Count, Factor, FactorRange, Length, Record
from exporter.artifacts.figures import Quantity

CheckVerdict = Literal["improved", "within_limit", "regressed", "inconclusive"]
Against = Literal["baseline_report", "baseline_arm"]
"""The candidate of an earlier report, or the unpruned arm of the same one."""


class RunKey(Record):
    """What two runs must have in common to be compared.

    ``model`` is the SHA-256 of the unpruned arm's graph, which both sessions measure beside the
    candidate. ``versions`` are those of the runtimes that the arms ran on, and the GPU's driver.
    ``text`` is the SHA-256 of the evaluation text and how much of it was read. ``form`` and
    ``quantization`` are what the arms' graphs note of themselves.
    """

    model: str
    backend: str
    provider: str
    precision: str
    device: str
    threads: Length
    shapes: list[str]
    text: str | None
    versions: dict[str, str]
    form: str | None = None
    quantization: str | None = None


KeyDifferences = dict[str, tuple[str, str]]
"""In which fields of their keys two runs differ, and the baseline's and the report's value."""


class Check(Record):
    """One quantity of one shape, task or file, held against its limit."""

    quantity: Quantity
    subject: str
    better: Literal["lower", "higher"]
    before: float | None = None
    after: float | None = None
    value: float | None = None
    ci95: tuple[float, float] | None = None
    limit: float | None = None
    noise_floor: float = 0
    verdict: CheckVerdict
    reason: str


class Drift(Record):
    """A slow change over the history of one shape, which no single step shows.

    ``per_entry`` is the Theil-Sen slope of the logarithm of time relative to the unpruned arm,
    ``total`` the factor over all ``entries``; above 1 the candidate became slower.
    """

    subject: str
    entries: Count
    per_entry: float
    total: float
    first: str
    last: str


class CheckReport(Artifact):
    """What ``depthcut check`` found.

    ``models`` are the paths of those that it judges: the ``baseline``, the ``candidate`` and, of an
    ``earlier`` report that it is held against, the candidate.
    """

    verdict: CheckVerdict
    against: Against
    models: dict[str, str]
    key: RunKey
    accepted_differences: KeyDifferences = Field(default_factory=dict)
    checks: list[Check]
    drift: list[Drift] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class HistoryRow(Record):
    """One shape of a run, as the history keeps it."""

    subject: str
    speedup: Factor
    ci95: FactorRange


class HistoryEntry(Record):
    """One line of the history: a run, without its samples.

    ``series`` is the hash of what all runs of one curve have in common: the key without shapes,
    text and versions. ``time`` is ISO 8601 with its offset.
    """

    schema_version: int
    kind: Literal["history_entry"] = "history_entry"
    time: str
    commit: str | None
    series: str
    candidate_sha256: str
    verdict: CheckVerdict
    rows: list[HistoryRow]
