"""The options that say how weights are quantised, and the settings that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import click

from exporter.cli.options import EXISTING_FILE
from exporter.cli.sections import option_in
from exporter.quantize.settings import Method, QuantizeSettings, Scheme

_F = TypeVar("_F", bound=Callable[..., Any])

quantization = option_in("Quantisation")
SCHEMES = click.Choice(get_args(Scheme))
QUANTIZE_OPTIONS = (
    "quantize_method", "quantize_gguf", "block_size", "symmetric", "accuracy_level",
    "embedding_bits", "head_bits", "modelopt_python",
)  # fmt: skip
"""What the options are called within a command."""
_BITS = click.Choice(["4", "8", "none"])
_MODELOPT = quantization(
    "--modelopt-python", type=EXISTING_FILE, metavar="PATH",
    help="For fp8, int4-awq and int8-qdq, for TensorRT: the Python of an environment that has "
    "NVIDIA's ModelOpt.",
)  # fmt: skip


def quantize_options(prefix: str = "") -> Callable[[_F], _F]:
    """Adds how weights are quantised, but for the scheme and the calibration text.

    Args:
        prefix: Begins each option's name, where they stand among those of other stages.
    """

    def add(function: _F) -> _F:
        for option in (_MODELOPT, *_options(f"--{prefix}")):
            function = option(function)
        return function

    return add


def _options(name: str) -> list[Callable[[Any], Any]]:
    """The last of them stands first in the help."""
    return [
        quantization(
            f"{name}head-bits", "head_bits", type=_BITS,
            help="Of the product that gives the logits; none takes the scheme's. [8]",
        ),
        quantization(
            f"{name}embedding-bits", "embedding_bits", type=_BITS,
            help="Of the tokens' table; none leaves it in float. [8]",
        ),
        quantization(
            f"{name}accuracy-level", "accuracy_level", type=int, metavar="N",
            help="ONNX Runtime's: 4 multiplies in int8, 1 in fp32. [4]",
        ),
        quantization(
            f"{name}symmetric/--{name[2:]}zero-points", "symmetric", default=None,
            help="Blocks around zero, or with a zero point each. [4 bits with, 8 without]",
        ),
        quantization(
            f"{name}block-size", "block_size", type=int, metavar="N",
            help="Weights that share a scale. [32]",
        ),
        quantization(
            f"{name}gguf", "quantize_gguf", type=EXISTING_FILE, metavar="FILE",
            help="For the method gguf: the file that the model comes from, whose blocks are kept.",
        ),
        quantization(
            f"{name}method", "quantize_method", type=click.Choice(get_args(Method)),
            help="Round to nearest, half-quadratic, by the calibration text's activations, or the "
            "blocks that a GGUF file brings. "
            f"[{'rtn' if name == '--' else 'gguf for a GGUF file in blocks, else rtn'}]",
        ),
    ]  # fmt: skip


def quantize_settings(
    scheme: Scheme, options: Mapping[str, Any], *, calibration: str | None
) -> QuantizeSettings:
    """What the options ask for; what they leave open is the settings' own default."""
    told = {
        "method": options["quantize_method"],
        "gguf": options["quantize_gguf"],
        "modelopt": options["modelopt_python"],
        **{name: options[name] for name in ("block_size", "symmetric", "accuracy_level")},
        "calibration": calibration,
    }
    known = {name: value for name, value in told.items() if value is not None}
    for name in ("embedding_bits", "head_bits"):
        value = options[name]
        if value is not None:
            known[name] = None if value == "none" else int(value)
    return QuantizeSettings(scheme=scheme, **known)
