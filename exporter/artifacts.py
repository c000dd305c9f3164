"""The data that passes between the stages, as files: JSON, validated, with their parents' hashes.

Every file begins with ``schema_version`` and ``kind`` and says what it was made from. A lower
importance score means more redundant, whatever the metric.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.errors import ArtifactError
from exporter.files import write_text

SCHEMA_VERSION = 1

DeletionKind = Literal["attention", "mlp", "block", "cross_attention", "mixer"]
Replacement = Literal["none", "bias", "linear"]
Phase = Literal["prefill", "decode", "encode"]
VerdictWord = Literal["faster", "slower", "same", "inconclusive"]

FEWEST_ROUNDS = 6
"""A row of fewer rounds is ``inconclusive``: its interval isn't one of 95 %."""

_TOLD_VERSIONS = (
    "depthcut", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript",
    "torch", "transformers", "tokenizers", "gguf", "scipy", "optimum-onnx", "tensorrt",
    "tensorrt-rtx",
)  # fmt: skip


class Record(BaseModel):
    """An immutable part of a file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Artifact(Record):
    """A stage's file: what it is, what it was made from, and by what."""

    schema_version: int = SCHEMA_VERSION
    kind: str
    made_from: dict[str, str] = Field(default_factory=dict)
    """Role (``model``, ``plan``, ...) to the hex SHA-256 of what was read."""
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())
    command: list[str] = Field(default_factory=lambda: command_line())

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, path: Path) -> Path:
        """Writes the file, whole or not at all."""
        write_text(path, self.to_json())
        return path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads and validates a file.

        Raises:
            ArtifactError: With the JSON path of what is wrong.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ArtifactError(f"{path} does not exist.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} can't be read: {error}.") from error
        return _validated(cls, text, path)


class ModelRef(Record):
    """Which model a report speaks of."""

    source: str
    architecture: str
    num_layers: int
    sha256: str


class CalibrationRef(Record):
    """Which text the scores rest on. ``tokens`` counts real tokens, padding left out."""

    source: str
    samples: int
    sequence_length: int
    tokens: int
    sha256: str


class Score(Record):
    """Importance of one sublayer or block; lower means more redundant.

    ``std_error`` is the standard error of the mean over samples; None with fewer than two.
    """

    layer: int = Field(ge=0)
    kind: DeletionKind
    score: float
    std_error: float | None


class ImportanceReport(Artifact):
    """importance.json."""

    kind: Literal["importance_report"] = "importance_report"
    model: ModelRef
    metric: str
    calibration: CalibrationRef
    scores: list[Score]


class PlannedDeletion(Record):
    """One thing that a plan removes."""

    layer: int = Field(ge=0)
    kind: DeletionKind
    replacement: Replacement = "none"


class ReplacementsRef(Record):
    """The safetensors file with fitted replacements."""

    path: str
    sha256: str


class PruningPlan(Artifact):
    """plan.json; ``deletions`` stand in the order in which they were chosen."""

    kind: Literal["pruning_plan"] = "pruning_plan"
    deletions: list[PlannedDeletion]
    replacements: ReplacementsRef | None = None
    budget: dict[str, int | float | str] = Field(default_factory=dict)
    importance_sha256: str | None = None
    predicted: dict[str, float] = Field(default_factory=dict)

    def describe(self) -> str:
        """The deletions in words: ``attention 25, 26 (linear); mlp 3``."""
        layers: dict[str, list[str]] = {}
        for deletion in self.deletions:
            place = "" if deletion.replacement == "none" else f" ({deletion.replacement})"
            layers.setdefault(deletion.kind, []).append(f"{deletion.layer}{place}")
        return "; ".join(f"{kind} {', '.join(numbers)}" for kind, numbers in layers.items())


class DeletedEntry(Record):
    """What one deletion took out of the graph, and what its replacement put in.

    ``parameters_added`` are the replacement's numbers; those of a bias that could be added to one
    of the graph's own are not counted, since the graph holds no more for it.
    """

    layer: int
    kind: DeletionKind
    replacement: Replacement
    residual_add: str
    nodes_removed: int
    parameters_removed: int
    inputs_removed: list[str]
    outputs_removed: list[str]
    parameters_added: int = 0


class RefusedEntry(Record):
    """What the finder would not cut, and why."""

    layer: int | None
    kind: DeletionKind | None
    node: str
    reason: str


class GraphSizeEntry(Record):
    """Nodes, weights and the weights' bytes."""

    nodes: int
    parameters: int
    bytes: int


class Verification(Record):
    """How the pruned graph was held against the masked original; ``method`` none: it was not."""

    method: str
    runs: int
    max_abs_error: float | None
    tolerance: float | None
    passed: bool | None


class PruneReport(Artifact):
    """prune.json, beside a pruned ONNX file; ``target`` is that file's name."""

    kind: Literal["prune_report"] = "prune_report"
    target: str = ""
    deleted: list[DeletedEntry]
    refused: list[RefusedEntry]
    before: GraphSizeEntry
    after: GraphSizeEntry
    verification: Verification
    kv_renumbering: dict[str, str] = Field(default_factory=dict)


class Environment(Record):
    """The machine and the settings of a measurement.

    ``load_average_1m`` is from before the measurement and counts whatever ran in that minute, this
    program included. ``other_cpu_share`` is what all other processes took of the machine's CPU
    time while the arms were timed; None where the kernel doesn't say.
    """

    machine: str
    processor: str
    cpu_count: int
    threads: int
    memory_bytes: int
    platform: str
    python: str
    gpu: str | None = None
    load_average_1m: float | None = None
    other_cpu_share: float | None = None


class Arm(Record):
    """One side of a comparison.

    ``cpu_nodes`` counts, by operator, the nodes that ran on the CPU although ``provider`` is
    another: by its kind, arithmetic on shapes. ``nodes`` counts those of the file, of which the
    backend fuses some.
    """

    backend: str
    provider: str
    precision: str
    path: str
    sha256: str
    file_bytes: int
    parameters: int
    nodes: int
    kv_cache_bytes_per_token: int
    cpu_nodes: dict[str, int] = Field(default_factory=dict)


class Arms(Record):
    """The unpruned and the pruned model."""

    baseline: Arm
    candidate: Arm


class ParityCheck(Record):
    """One model's outputs against a witness, in one phase."""

    name: str
    phase: Phase
    max_abs_error: float
    tolerance: float
    passed: bool


class LatencySamples(Record):
    """Raw times of one arm, in the order in which they were taken, and their percentiles."""

    median_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    samples_ms: list[float]


class Speedup(Record):
    """Baseline time over candidate time, with a 95 % interval; above 1 the candidate is faster."""

    ratio: float
    ci95: tuple[float, float]


class LatencyRow(Record):
    """One shape, both arms, interleaved.

    ``sequence_length`` is the number of new tokens, ``past_length`` what the KV cache holds.
    ``rounds`` is how many equal parts, in order, each arm's samples fall into: part *i* of both
    arms was taken in the same round, so that a saved report can be analysed again as pairs.
    ``settled`` says whether times had stopped changing when the warm-up ended.
    """

    phase: Phase
    batch: int
    sequence_length: int
    past_length: int
    rounds: int = Field(ge=1)
    baseline: LatencySamples
    candidate: LatencySamples
    speedup: Speedup
    verdict: VerdictWord
    settled: bool | None = None


class PerplexityPair(Record):
    """exp of the mean negative log-likelihood per token, both arms on the same tokens."""

    baseline: float
    candidate: float


class Accuracy(Record):
    """How far the candidate's predictions are from the baseline's.

    ``kl_divergence`` is KL(baseline || candidate) in nats, mean over positions;
    ``top1_agreement`` the share of positions with the same most likely token.
    """

    text_source: str
    text_sha256: str
    tokens: int
    perplexity: PerplexityPair | None
    kl_divergence: float | None
    top1_agreement: float | None
    tasks: dict[str, Any] = Field(default_factory=dict)


class ComparisonReport(Artifact):
    """report.json."""

    kind: Literal["comparison_report"] = "comparison_report"
    environment: Environment
    arms: Arms
    plan: list[PlannedDeletion] = Field(default_factory=list)
    calibration: CalibrationRef | None = None
    parity: list[ParityCheck]
    latency: list[LatencyRow]
    accuracy: Accuracy | None


_A = TypeVar("_A", bound=Artifact)


class _Head(BaseModel):
    """What is read first of any file: is it ours, and may this version read it."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")
    schema_version: Annotated[int, Field(ge=1)]
    kind: str


def _validated(cls: type[_A], text: str, path: Path) -> _A:
    try:
        head = _Head.model_validate_json(text)
        if head.schema_version > SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: $.schema_version is {head.schema_version}; "
                f"this depthcut reads up to {SCHEMA_VERSION}.",
                "Update depthcut.",
            )
        return cls.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path}: {json_path(first['loc'])}: {first['msg']}.") from error


def json_path(location: tuple[int | str, ...]) -> str:
    """A pydantic location as a JSON path: ``$.deletions[3].layer``."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    return "$" + "".join(parts)


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that decide results."""
    found = {}
    for name in _TOLD_VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> list[str]:
    """The running command, with the program's bare name."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
