"""report.json: two arms, what they were, how fast they ran, and how far their answers differ."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from exporter.artifacts.accuracy import Accuracy
from exporter.artifacts.base import Artifact, Count, Layers, Record
from exporter.artifacts.forms import (
    FLOAT_BASELINE,
    FLOAT_CANDIDATE,
    Corner,
    FormRecord,
    QuantizationRecord,
)
from exporter.artifacts.healing import Healing
from exporter.artifacts.latency import Environment, LatencyRow, Phase
from exporter.artifacts.stages import CalibrationRef, PlannedDeletion, PlanParts
from exporter.artifacts.uses import FolderUses
from exporter.artifacts.work import GraphWork, WorkFigure, without_reads
from graph_passes.types import MOST_LAYERS


class EngineFacts(Record):
    """What is known of one built engine without running it.

    ``layers`` are those that compute, by type; ``memory_bytes`` by kind, as the builder says.
    """

    path: str
    sha256: str
    engine_bytes: Count
    backend: str
    backend_version: str
    built_for: str
    precision: str
    network_layers: Count
    layers: dict[str, Count]
    memory_bytes: dict[str, Count]
    build_s: float


RUN_IN_FP32 = " as fp32"
"""Ends the precision of an arm that was run in another than its file has."""


class Arm(Record):
    """One side of a comparison.

    ``precision`` is the file's; it ends with :data:`RUN_IN_FP32` where that was run in float32.

    ``cpu_nodes`` counts, by operator, the nodes that ran on the CPU although ``provider`` is
    another: by its kind, arithmetic on shapes. ``nodes`` counts those of the file, of which the
    backend fuses some. ``engines`` are its builds. ``not_run`` says why these were not run, where
    that is so: they are then described by their build facts alone, and what was measured is
    ``backend``'s, on the ONNX file at ``path``; where there was none, nothing was.
    ``device_memory_bytes`` is what it took of the GPU while it ran. ``layers`` is the number of
    layers of the model as its config has it, from before anything was cut out of it. ``form`` and
    ``quantization`` are what the graph notes of itself; None for a graph that notes nothing.
    ``huge_page_bytes`` is how much of the process lay on huge pages once this arm was loaded.
    ``prefill_chunk_tokens`` is the fewest tokens of a chunk, where a prompt of one row was run in
    chunks while it was timed; 0 where prompts ran whole. ``notes`` are what else the reader must
    know of how it ran, such as that an engine was built on another card. ``work`` is what the graph
    at ``path`` does; None where there is no ONNX graph.
    """

    backend: str
    provider: str
    precision: str
    path: str
    sha256: str
    file_bytes: Count
    parameters: Count
    nodes: Count
    kv_cache_bytes_per_token: Count
    cpu_nodes: dict[str, Count] = Field(default_factory=dict)
    engines: list[EngineFacts] = Field(default_factory=list)
    not_run: str | None = None
    device_memory_bytes: Count | None = None
    layers: Layers | None = None
    form: FormRecord | None = None
    quantization: QuantizationRecord | None = None
    huge_page_bytes: Count = 0
    prefill_chunk_tokens: Count = 0
    notes: list[str] = Field(default_factory=list)
    work: Annotated[GraphWork | None, BeforeValidator(without_reads)] = None

    @property
    def counted(self) -> dict[WorkFigure, int]:
        """What is counted and not measured, by name: of the graph, and of the largest engine."""
        found: dict[WorkFigure, int] = {} if self.work is None else dict(self.work.figures)
        if self.engines:
            found["engine_layers"] = max(sum(each.layers.values()) for each in self.engines)
        scratch = [each.memory_bytes.get("activation") for each in self.engines]
        known = [size for size in scratch if size is not None]
        return found | ({"scratch_bytes": max(known)} if known else {})


class Arms(Record):
    """The unpruned and the pruned model, and further arms that are timed beside them."""

    baseline: Arm
    candidate: Arm
    references: dict[str, Arm] = Field(default_factory=dict)


class ParityCheck(Record):
    """One model's outputs against a witness, in one phase."""

    name: str
    phase: Phase
    max_abs_error: float
    tolerance: float
    passed: bool


class ComparisonReport(Artifact):
    """report.json.

    ``corners`` are empty, or the four of whole and cut, float and quantised; the quantised ones are
    then the baseline and the candidate. Further forms that were asked for stand behind these, or
    behind the pair alone. ``healing`` is how the plan was healed on the way, if at
    all, with what that gained before anything was exported. ``parts`` are the texts that the plan
    was made by, as far as they are known; ``calibration`` is that of the scores. ``uses`` are the
    lines that load and run each folder which was written with it. ``longest_text`` are the tokens
    at which sentence-transformers cuts a text, where the baseline's folder says so.
    """

    kind: Literal["comparison_report"] = "comparison_report"
    environment: Environment
    arms: Arms
    plan: list[PlannedDeletion] = Field(default_factory=list, max_length=4 * MOST_LAYERS)
    calibration: CalibrationRef | None = None
    parts: PlanParts = Field(default_factory=PlanParts)
    parity: list[ParityCheck] = Field(max_length=1_000)
    latency: list[LatencyRow] = Field(max_length=1_000)
    accuracy: Accuracy | None
    corners: list[Corner] = Field(default_factory=list, max_length=1_000)
    healing: Healing | None = None
    uses: list[FolderUses] = Field(default_factory=list)
    longest_text: Annotated[Count, Field(ge=1)] | None = None

    @property
    def floats(self) -> tuple[str, str] | None:
        """Where the models in float lie whose quantised forms the two arms are."""
        found = [self.arms.references.get(name) for name in (FLOAT_BASELINE, FLOAT_CANDIDATE)]
        paths = [arm.path for arm in found if arm is not None]
        return (paths[0], paths[1]) if len(paths) > 1 else None

    @property
    def also(self) -> list[str]:
        """Where the further forms lie."""
        known = ("baseline", "candidate", FLOAT_BASELINE, FLOAT_CANDIDATE)
        names = [corner.arm for corner in self.corners if corner.arm not in known]
        return [self.arms.references[name].path for name in names]
