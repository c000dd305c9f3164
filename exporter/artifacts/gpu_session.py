"""session.json of `depthcut gpu-session`: what each step measured on a card, and what was known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from exporter.artifacts.base import Artifact, Record
from exporter.artifacts.latency import TimedPhase
from exporter.artifacts.sweep import SweepFailure

GpuStepStatus = Literal["done", "failed", "late", "missing"]
"""``late``: its time was over; what it had measured by then is kept, and it goes on when it is run
again. ``missing``: it was not come to."""


class GpuCard(Record):
    """The card as the driver tells it.

    Attributes:
        name: The driver's.
        compute_capability: Such as ``sm90``.
        memory_bytes: All of its memory.
        cuda_version: The newest CUDA that the driver takes.
        peak_bytes_per_s: By the memory's clock and the bus's width; None where the driver doesn't
            say.
        copy_bytes_per_s: Read and written by a copy within the card.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    cuda_version: str
    peak_bytes_per_s: float | None = None
    copy_bytes_per_s: float | None = None


class GpuTests(Record):
    """What came of the tests that need a GPU; ``failures`` are their names."""

    passed: int
    failed: int
    skipped: int
    failures: list[str] = Field(default_factory=list)


class GpuCheck(Record):
    """An engine's logits held against another's.

    Attributes:
        subject: The engine.
        against: The other.
        phase: ``prefill`` or ``decode``, of which all steps count.
        largest_error: As a share of the other's largest logit.
        tolerance: What it may be.
    """

    subject: str
    against: str
    phase: TimedPhase
    largest_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN isn't."""
        return self.largest_error <= self.tolerance


class GpuTime(Record):
    """What a run of an engine takes, at one shape.

    Attributes:
        subject: The model.
        arm: Which of the things that are compared, such as ``whole`` and ``cut``.
        phase: What is run.
        batch: Sequences.
        sequence_length: New tokens of each.
        past_length: Tokens in the cache.
        clock: The host's, the call and the wait for the device included; or the device's own.
        median_ms: Of the samples.
        samples_ms: Each run.
        least_bytes: What it has to read of the card's memory: weights, and what is filled of the
            caches; None where that isn't reckoned.
        scratch_bytes: That the builder says the engine needs beside weights and caches.
    """

    subject: str
    arm: str
    phase: TimedPhase
    batch: int
    sequence_length: int
    past_length: int = 0
    clock: Literal["host", "device"] = "host"
    median_ms: float
    samples_ms: list[float]
    least_bytes: int | None = None
    scratch_bytes: int | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """At which speed it has read, if it has read no more than it must."""
        return None if self.least_bytes is None else self.least_bytes / (self.median_ms / 1e3)


class GpuLargest(Record):
    """An arm's speed at the largest batch that fits.

    Attributes:
        subject: The model.
        arm: ``whole`` or ``cut``.
        layers: Of the model that was run.
        of_layers: Of the whole shape; more than ``layers`` where a slice was run.
        batch: The largest that fits.
        fits_not: The smallest that was seen not to fit; None where the engine holds no more.
        batch_with_both: Reckoned, for one who keeps the engines of both phases loaded: the weights
            lie there twice.
        prompt: Tokens of each prompt.
        new: Tokens that each sequence generates.
        prefill_s: One prompt's time, times the batch.
        decode_s: All steps after the first token.
        tokens_per_s: New tokens of all sequences, over both.
        weights_bytes: Of the engine that was loaded: its weights lie there once.
        cache_bytes: Of all sequences.
    """

    subject: str
    arm: str
    layers: int
    of_layers: int
    batch: int
    fits_not: int | None
    batch_with_both: int
    prompt: int
    new: int
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    weights_bytes: int
    cache_bytes: int


class GpuStep(Artifact):
    """A step's file. ``rehearsal``: no card was there, and no number of it says anything."""

    kind: Literal["gpu_step"] = "gpu_step"
    name: str
    title: str
    rehearsal: bool
    status: GpuStepStatus = "missing"
    seconds: float = 0.0
    failure: SweepFailure | None = None
    card: GpuCard | None = None
    tests: GpuTests | None = None
    checks: list[GpuCheck] = Field(default_factory=list)
    times: list[GpuTime] = Field(default_factory=list)
    largest: list[GpuLargest] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class GpuFinding(Record):
    """Something that was known before, and what was found.

    Attributes:
        what: It is about.
        known: What was expected.
        found: What was measured; empty where nothing was.
        agrees: None where nothing was measured, or in a rehearsal.
    """

    what: str
    known: str
    found: str = ""
    agrees: bool | None = None


class GpuSession(Artifact):
    """session.json; ``rehearsal.json`` where no card was there."""

    kind: Literal["gpu_session"] = "gpu_session"
    rehearsal: bool
    steps: list[GpuStep]
    findings: list[GpuFinding]

    @property
    def card(self) -> GpuCard | None:
        """The card, once a step has looked at it."""
        return next((step.card for step in self.steps if step.card), None)


def gains(steps: Iterable[GpuStep]) -> dict[str, float]:
    """By model, how many times as many tokens a second the cut one gives."""
    rows = [row for step in steps for row in step.largest]
    whole, cut = (
        {row.subject: row.tokens_per_s for row in rows if row.arm == arm}
        for arm in ("whole", "cut")
    )
    return {subject: cut[subject] / whole[subject] for subject in whole if subject in cut}
