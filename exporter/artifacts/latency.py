"""The part of report.json that speaks of time: the machine, raw samples, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from exporter.artifacts.base import (
    RECORDINGS,
    TEXTS,
    Count,
    Factor,
    FactorRange,
    Length,
    Milliseconds,
    Parts,
    Record,
)

Phase = Literal["prefill", "decode", "encode"]
"""What one run of a graph does."""
TimedPhase = Literal[
    "prefill", "decode", "encode", "first_token", "per_token", "generate"
]  # fmt: skip
"""What a row times: one run of the graph, or a part of a whole generation."""
VerdictWord = Literal["faster", "slower", "same", "inconclusive"]
Stop = Literal["narrow", "budget", "rounds"]
"""Why measuring ended: a narrow enough interval, no time left, or as many rounds as were asked."""

FEWEST_ROUNDS = 6
"""A row of fewer rounds is ``inconclusive``: its interval isn't one of 95 %."""


@dataclass(frozen=True)
class Shape:
    """One cell of the grid that is measured: a run of a graph, or a whole generation."""

    # prefill: an empty cache; decode: a filled one; encode: none. A generation: prefill
    phase: Phase
    batch: int
    sequence_length: int  # new tokens of a run, or the prompt's
    past_length: int = 0
    new_tokens: int = 0  # that are generated, also where one ends a text; 0 of a run
    counts: Parts = field(default="tokens", compare=False)  # what `sequence_length` counts

    @property
    def phases(self) -> tuple[TimedPhase, ...]:
        """Its rows; of a generation the time to the first token, of a later one, and of all."""
        return ("first_token", "per_token", "generate") if self.new_tokens else (self.phase,)

    @property
    def total_length(self) -> int:
        """Positions that it reaches."""
        return self.past_length + self.sequence_length + self.new_tokens

    def __str__(self) -> str:
        past = f", cache {self.past_length}" if self.past_length else ""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        if self.new_tokens:
            return f"generate {self.new_tokens} after {self.sequence_length}{batch}"
        if self.counts == RECORDINGS.parts:  # all have one length
            return f"{self.phase} {RECORDINGS.one}{batch}"
        parts = "" if self.counts == TEXTS.parts else f" {self.counts}"
        return f"{self.phase} {self.sequence_length}{parts}{past}{batch}"


class MachineState(Record):
    """The machine at one moment; None where the kernel or the driver doesn't say.

    ``throttled`` is of the time since the moment before, of a GPU while it worked.
    ``quota_cpus`` is the CPU time that a container may take, in CPUs; ``quota_waiting_share`` is
    the share of the time since the look before that it was kept waiting by that, and
    ``steal_share`` the share of all CPU time that other virtual machines took.
    """

    gone = frozenset({"seconds"})

    throttled: bool | None = None
    quota_cpus: float | None = None
    quota_waiting_share: float | None = None
    steal_share: float | None = None


class Environment(Record):
    """The machine and the settings of a measurement."""

    gone = frozenset({"order_seed"})

    machine: str
    processor: str
    cpu_count: Count
    threads: Length
    memory_bytes: Count
    platform: str
    python: str
    gpu: str | None = None
    gpu_settings: dict[str, str] = Field(default_factory=dict)
    other_cpu_share: float | None = None
    affinity: list[Count] | None = None
    states: list[MachineState] = Field(default_factory=list)


class LatencySamples(Record):
    """Raw times of one arm, in the order in which they were taken, and their percentiles."""

    median_ms: Milliseconds
    p95_ms: Milliseconds
    p99_ms: Milliseconds
    samples_ms: Annotated[list[Milliseconds], Field(min_length=1, max_length=1 << 20)]


class Speedup(Record):
    """Baseline time over candidate time, with a 95 % interval; above 1 the candidate is faster."""

    ratio: Factor
    ci95: FactorRange


def _ratio(floor: Any) -> Any:
    """Files of earlier versions have more of it."""
    return floor.get("ratio") if isinstance(floor, dict) else floor


class LatencyRow(Record):
    """One shape, both arms, interleaved.

    ``sequence_length`` is the number of new tokens of a run, ``past_length`` what the KV cache
    holds. ``first_token``, ``per_token`` and ``generate`` are parts of one generation:
    ``sequence_length`` is then the prompt's, ``new_tokens`` what is generated. ``counts`` says what
    ``sequence_length`` counts, of images and recordings since it is told. ``noise_floor`` is a
    factor by which two equal arms are told to differ in no more than 5 of 100 such sessions: a
    speedup within ``1 / noise_floor .. noise_floor`` is noise, whatever its interval says.
    """

    phase: TimedPhase
    batch: Length
    sequence_length: Length
    past_length: Length
    new_tokens: Length = 0
    rounds: Annotated[Length, Field(ge=1)]
    builds: Annotated[Length, Field(ge=1)] = 1
    loads: Annotated[Length, Field(ge=1)] = 1
    baseline: LatencySamples
    candidate: LatencySamples
    references: dict[str, LatencySamples] = Field(default_factory=dict)
    speedup: Speedup
    verdict: VerdictWord
    verdict_interval: FactorRange | None = None
    threshold: float = 0.01
    noise_floor: Annotated[Factor, Field(ge=1), BeforeValidator(_ratio)] | None = None
    stopped: Stop | None = None
    seconds: float | None = None
    settled: bool | None = None
    clock: Literal["host", "device"] = "host"
    launches: dict[str, str] = Field(default_factory=dict)
    counts: Parts = "tokens"

    @property
    def shape_name(self) -> str:
        """The shape in words, the same for equal shapes and for no others."""
        parts = [self.phase, f"batch {self.batch}", f"length {self.sequence_length}"]
        parts += [f"past {self.past_length}"] if self.past_length else []
        parts += [f"new {self.new_tokens}"] if self.new_tokens else []
        return ", ".join(parts)
