"""What is asked of a quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scheme = Literal["int4", "int8", "mixed", "int8-dynamic", "int8-qdq"]
"""``int4`` and ``int8`` are weight-only, ``mixed`` both by sensitivity; the last two quantise
activations as well."""
Method = Literal["rtn", "hqq", "gptq"]


@dataclass(frozen=True)
class QuantizeSettings:
    """How weights are quantised.

    Attributes:
        scheme: Into what.
        method: Round to nearest, half-quadratic, or by the calibration text's activations.
        block_size: Weights that share a scale; None takes what was measured to be best.
        symmetric: Without zero points; None takes what was measured to be best.
        accuracy_level: ONNX Runtime's: 4 computes in int8, 1 in fp32; None takes the best.
        embedding_bits: Of the token table; None leaves it in float.
        head_bits: Of the last product; None as all others.
        calibration: A text, as :func:`exporter.texts.read_texts` takes it; for methods and schemes
            that need one.
    """

    scheme: Scheme = "int4"
    method: Method = "rtn"
    block_size: int | None = None
    symmetric: bool | None = None
    accuracy_level: int | None = None
    embedding_bits: int | None = None
    head_bits: int | None = None
    calibration: str | None = None
