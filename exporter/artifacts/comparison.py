"""report.json: two arms, what they were, how fast they ran, and how far their answers differ."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from exporter.artifacts.accuracy import Accuracy, Interval
from exporter.artifacts.base import Artifact, Count, Layers, Record
from exporter.artifacts.figures import Quantity
from exporter.artifacts.healing import Healing
from exporter.artifacts.latency import Environment, LatencyRow, Phase, VerdictWord
from exporter.artifacts.stages import CalibrationRef, PlannedDeletion, PlanParts
from graph_passes.types import MOST_LAYERS

FORM_KEY = "depthcut.form"
"""Where a graph's ``metadata_props`` hold its :class:`FormRecord`, as JSON."""
QUANTIZATION_KEY = "depthcut.quantization"
"""Where a graph's ``metadata_props`` hold its :class:`QuantizationRecord`, as JSON."""


class FormRecord(Record):
    """For which runtime a graph was written, by what, and which operators that fused.

    ``writer`` names the exporter and its version. ``passes`` are what rewrote its graph after it,
    in order. ``fused`` counts the fused operators. ``cache_room`` is the fixed length of its
    caches: a run of this graph reads all of it, an engine what its own record says. ``remark`` says
    why a faster form was not to be had, where that is so.
    """

    target: str
    writer: str
    passes: list[str] = Field(default_factory=list)
    fused: dict[str, Count] = Field(default_factory=dict)
    cache_room: Count | None = None
    remark: str | None = None

    @property
    def name(self) -> str:
        """For what and by whom, in words."""
        return f"{self.target} ({', '.join([self.writer, *self.passes])})"


class QuantizationRecord(Record):
    """How a graph's weights were quantised.

    ``bits`` counts the products by their weights' bits, ``{"4": 180, "8": 31}``; those that stayed
    in float are not in it. ``embedding_bits`` and ``head_bits`` are None where they stayed in
    float. ``calibration`` is the text that a method looked at, and its hash. ``kept_blocks`` counts
    the weights that keep a GGUF file's own blocks by their type there; ``gguf`` is the file, and
    its hash.
    """

    scheme: str
    method: str
    bits: dict[str, Count]
    block_size: Count | None = None
    symmetric: bool | None = None
    accuracy_level: Count | None = None
    embedding_bits: Count | None = None
    head_bits: Count | None = None
    calibration: str | None = None
    gguf: str | None = None
    kept_blocks: dict[str, Count] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """How, in words: the same for equal settings and for no others."""
        zeros = {None: None, True: "symmetric", False: "zero points"}[self.symmetric]
        result = (
            self.method,
            self.block_size and f"blocks of {self.block_size}",
            zeros,
            self.accuracy_level is not None and f"accuracy level {self.accuracy_level}",
            self.embedding_bits and f"embedding of {self.embedding_bits} bits",
            self.head_bits and f"head of {self.head_bits} bits",
            self.calibration and f"calibrated on {self.calibration}",
        )
        return f"{self.scheme} ({', '.join(part for part in result if part)})"


FLOAT_BASELINE, FLOAT_CANDIDATE = "float baseline", "float candidate"
"""What the report calls the whole and the cut model in float, beside their quantised forms."""


class Corner(Record):
    """The whole or a cut model, in float or quantised; further ones stand behind the usual four.

    ``figures`` are by their keys, against the whole model in float; ``rises`` are the changes of
    the logarithms of those that both arms have, against the ``whole`` one in the same form.
    """

    arm: str
    whole: str | None = None
    pruned: bool
    quantized: bool
    figures: dict[Quantity, float] = Field(default_factory=dict)
    rises: dict[Quantity, Interval] = Field(default_factory=dict)
    speedups: dict[str, Interval] = Field(default_factory=dict)
    over_whole: dict[str, Interval] = Field(default_factory=dict)
    verdicts: dict[str, VerdictWord] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, content: Any) -> Any:
        """They have each figure by itself."""
        if not isinstance(content, dict) or "file_bytes" not in content:
            return content
        own = {key: value for key, value in content.items() if key in cls.model_fields}
        rest = {
            key: value for key, value in content.items() if key not in own and value is not None
        }
        rises = {
            key.replace("log_perplexity_increase", "perplexity"): rest.pop(key)
            for key in [*rest]
            if key.endswith("log_perplexity_increase")
        }
        del rest["file_bytes"]
        return {**own, "figures": rest, "rises": rises}


Target = Literal["portable", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
"""The runtime that a graph is written for."""


class EngineCheck(Record):
    """How far an engine was from ONNX Runtime at worst, on a card with a driver's CUDA version.

    ``error`` and ``tolerance`` are shares of an output's root mean square; without numbers the
    error is infinite.
    """

    card: str
    worst: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.error <= self.tolerance


class EngineFacts(Record):
    """What is known of one built engine; its memory as the builder says."""

    path: str
    sha256: str
    engine_bytes: Count
    backend: str
    backend_version: str
    built_for: str
    precision: str
    memory_bytes: dict[str, Count]
    check: EngineCheck | None = None
    """None where it wasn't held against ONNX Runtime."""


RUN_IN_FP32 = " as fp32"
"""Ends the precision of an arm that was run in another than its file has."""


class Arm(Record):
    """One side of a comparison.

    ``precision`` is the file's; it ends with :data:`RUN_IN_FP32` where that was run in float32.
    ``encoder_layers`` are those of an encoder-decoder's encoder, which come first in its plan.
    """

    gone = frozenset({"layers"})

    backend: str
    provider: str
    precision: str
    path: str
    sha256: str
    file_bytes: Count
    parameters: Count
    nodes: Count
    kv_cache_bytes_per_token: Count
    engines: list[EngineFacts] = Field(default_factory=list)
    not_run: str | None = None
    device_memory_bytes: Count | None = None
    encoder_layers: Layers | None = None
    form: FormRecord | None = None
    quantization: QuantizationRecord | None = None
    notes: list[str] = Field(default_factory=list)

    @property
    def largest_engine_bytes(self) -> int | None:
        """Of its engines."""
        return max((engine.engine_bytes for engine in self.engines), default=None)


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
    """report.json; ``left_out`` says of what was asked for why it was not timed."""

    environment: Environment
    arms: Arms
    plan: list[PlannedDeletion] = Field(default_factory=list, max_length=4 * MOST_LAYERS)
    calibration: CalibrationRef | None = None
    parts: PlanParts = Field(default_factory=PlanParts)
    parity: list[ParityCheck] = Field(max_length=1_000)
    latency: list[LatencyRow] = Field(max_length=1_000)
    left_out: list[str] = Field(default_factory=list, max_length=1_000)
    accuracy: Accuracy | None
    corners: list[Corner] = Field(default_factory=list, max_length=1_000)
    healing: Healing | None = None

    @property
    def also(self) -> list[str]:
        """Where the further forms lie."""
        known = ("baseline", "candidate", FLOAT_BASELINE, FLOAT_CANDIDATE)
        names = [corner.arm for corner in self.corners if corner.arm not in known]
        return [self.arms.references[name].path for name in names]
