"""The part of report.json, and of a graph's own notes, that says how a graph is written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.accuracy import Interval
from exporter.artifacts.base import Count, Record
from exporter.artifacts.latency import VerdictWord

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
        told = (
            self.method,
            self.block_size and f"blocks of {self.block_size}",
            zeros,
            self.accuracy_level is not None and f"accuracy level {self.accuracy_level}",
            self.embedding_bits and f"embedding of {self.embedding_bits} bits",
            self.head_bits and f"head of {self.head_bits} bits",
            self.calibration and f"calibrated on {self.calibration}",
        )
        return f"{self.scheme} ({', '.join(part for part in told if part)})"


FLOAT_BASELINE, FLOAT_CANDIDATE = "float baseline", "float candidate"
"""What the report calls the whole and the cut model in float, beside their quantised forms."""


class Corner(Record):
    """The whole or a cut model, in float or quantised; further ones stand behind the usual four.

    ``arm`` is its name among the arms: ``baseline``, ``candidate``, or that of a reference, by
    which its times are found in the latency rows. The accuracy is against the whole model in float,
    whose own is its perplexity alone; ``embedding_cosine`` is that of models that predict no
    tokens, ``other_perplexity`` that on the second text. ``whole`` is the whole model that is
    quantised alike, None if it is this one or not among the arms; both increases are over it, as
    that of :class:`Accuracy`. ``speedups`` are over the whole model in float, ``over_whole`` and
    ``verdicts`` over ``whole``, by the row's shape name.
    """

    arm: str
    whole: str | None = None
    pruned: bool
    quantized: bool
    file_bytes: Count
    perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    exact_match: float | None = None
    embedding_cosine: float | None = None
    other_perplexity: float | None = None
    log_perplexity_increase: Interval | None = None
    other_log_perplexity_increase: Interval | None = None
    speedups: dict[str, Interval] = Field(default_factory=dict)
    over_whole: dict[str, Interval] = Field(default_factory=dict)
    verdicts: dict[str, VerdictWord] = Field(default_factory=dict)


Target = Literal["portable", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
"""The runtime that a graph is written for."""
