"""What is asked of a quantisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from exporter.errors import QuantizationError
from exporter.option_types import InputFile, Integer, Written
from exporter.options import Options, Rule, dataclass, option, refusal

QUANTIZATION = "Quantisation"

Scheme = Literal["int4", "int8", "int8-dynamic", "int8-qdq"]
"""``int4`` and ``int8`` are weight-only; the others quantise activations as well."""
Method = Literal["rtn", "hqq", "gguf"]
"""How a weight-only scheme rounds. ``rtn``: to nearest. ``hqq``: half-quadratic, zero points in
float. ``gguf``: weights that a GGUF file brings in blocks keep these."""

WEIGHT_ONLY: frozenset[Scheme] = frozenset({"int4", "int8"})
_LEAST_BLOCK, _MOST_BLOCK = 16, 256


def _bits(value: Any) -> Any:
    return None if value == "none" else {"4": 4, "8": 8}.get(value, value)


Bits = Annotated[Literal[4, 8] | None, BeforeValidator(_bits), Written("4|8|none")]
"""Of some weights; None, ``none``: no own ones."""


def _possible(block: int) -> int:
    if block & (block - 1) or not _LEAST_BLOCK <= block <= _MOST_BLOCK:
        raise ValueError(
            f"no block of {block} weights is possible; a power of two from {_LEAST_BLOCK} to "
            f"{_MOST_BLOCK} is, such as 32"
        )
    return block


@dataclass(frozen=True)
class QuantizeSettings(Options):
    """How weights are quantised."""

    section = QUANTIZATION
    switch = "scheme"
    scheme: Scheme = option(
        "int4",
        "Scheme to quantise by. int4, int8: weights only; int8-*: activations, too. TensorRT takes "
        "int8-qdq alone.",
        "--quantize",
    )
    method: Method | None = option(
        None,
        "Rounding method: to nearest (rtn), half-quadratic (hqq), or the blocks of a GGUF file "
        "(gguf).",
        "--quantize-method",
        usual="rtn; in export from a GGUF file with such blocks: gguf",
    )
    block_size: Annotated[int, AfterValidator(_possible), Written("N")] | None = option(
        None, "Number of weights that share a scale.", usual="32", config_only=True
    )
    symmetric: bool | None = option(
        None,
        "Use symmetric blocks, or a zero point for each block.",
        "--symmetric/--zero-points",
        usual="zero points with 4 bits, symmetric with 8",
        config_only=True,
    )
    accuracy_level: Annotated[Integer, Field(ge=0, le=4), Written("N")] | None = option(
        None, "ONNX Runtime's: 4 multiplies in int8, 1 in fp32.", usual="4", config_only=True
    )
    embedding_bits: Bits = option(
        8, "Bits of the token embedding; none leaves it in float.", config_only=True
    )
    head_bits: Bits = option(
        8,
        "Bits of the layer that computes the logits; none uses those of the scheme.",
        config_only=True,
    )
    calibration: tuple[str, ...] = option(
        (),
        "Text for int8-qdq: a file or folder of text, hf:DATASET or pydoc. Several make a mixture.",
        metavar="SOURCE",
    )
    gguf: InputFile | None = option(
        None, "For the method gguf: the GGUF file of the model, whose blocks are kept.", rare=True
    )

    @property
    def weight_only(self) -> bool:
        """Whether activations stay in float between the products."""
        return self.scheme in WEIGHT_ONLY

    @property
    def needs_calibration(self) -> bool:
        """Whether it can't be done without a text."""
        return self.scheme == "int8-qdq"

    @property
    def rounding(self) -> Method:
        """The method, chosen or the default."""
        return self.method or "rtn"

    @property
    def bits(self) -> int:
        """Of a product for which nothing else is said."""
        return 4 if self.scheme == "int4" else 8

    @property
    def block(self) -> int:
        """The block size, chosen or measured."""
        return 32 if self.block_size is None else self.block_size

    @property
    def without_zero_points(self) -> bool:
        """Whether the blocks are symmetric, chosen or measured."""
        if self.symmetric is None:
            return self.method != "hqq" and self.bits == 8
        return self.symmetric

    @property
    def level(self) -> int:
        """The accuracy level, chosen or measured."""
        return 4 if self.accuracy_level is None else self.accuracy_level

    def refuse(self, dtypes: Iterable[str] = ()) -> None:
        """Refuses a scheme without the text that it needs, or for weights without kernels."""
        if self.needs_calibration and not self.calibration:
            hint = "Name a text or, for a model of images, a folder of them: {0}."
            text = f"The scheme {self.scheme} needs something to calibrate on."
            raise refusal(self, ["calibration"], text, hint, code="no-calibration")
        possible = ["float32"] if self.scheme == "int8-dynamic" else ["float32", "float16"]
        if wrong := set(dtypes).difference(possible):
            raise QuantizationError(
                f"{self.scheme} takes weights in {' or '.join(possible)}, not in {min(wrong)}.",
                "Export the model in float32.",
                code="wrong-dtype",
            )

    rules = (
        Rule(
            ("method", "gguf"),
            lambda told: (told.method == "gguf") != (told.gguf is not None),
            "{0} gguf and {1}, the file whose blocks are kept, go together.",
            "Give both, or neither.",
        ),
        Rule(
            ("symmetric", "method"),
            lambda told: told.method == "hqq" and bool(told.symmetric),
            "HQQ moves the zero points, so it can't be symmetric.",
            "Leave {0} out.",
        ),
        Rule(
            ("method", "scheme"),
            lambda told: not told.weight_only and told.rounding != "rtn",
            "{1} int8-dynamic and int8-qdq only round to nearest.",
            "Leave {0} out.",
        ),
        Rule(
            ("block_size", "symmetric", "accuracy_level", "embedding_bits", "head_bits"),
            lambda told: not told.weight_only and told._shaped,
            "What quantises activations has a scale a column: no {0}, {1}, {2}, {3} or {4}.",
            "Leave these options out, or take int4 or int8.",
        ),
    )

    @property
    def _shaped(self) -> bool:
        """Whether something is said that only our own weight-only schemes listen to."""
        said = (self.block_size, self.symmetric, self.accuracy_level)
        bits = (self.embedding_bits, self.head_bits)
        return any(value is not None for value in said) or bits != (8, 8)
