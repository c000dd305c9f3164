"""Options of the commands that deal with engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from exporter.cli.options import ANY_PATH, Size
from exporter.cli.sections import Count, option_in

_F = TypeVar("_F", bound=Callable[..., Any])

shapes = option_in("Shapes that the engine serves")
engines = option_in("Engines")
_TOO_MANY_BYTES = 1 << 63

backend_option = click.option(
    "--backend", type=click.Choice(["tensorrt-rtx", "tensorrt"]), default="tensorrt-rtx",
    show_default=True, help="Which library; TensorRT needs the card that is to run the engine.",
)  # fmt: skip


class Workspace(Size):
    """Bytes that a builder can be given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads the size; a number from code passes."""
        size = super().convert(value, param, ctx)
        if not 0 < size < _TOO_MANY_BYTES:
            self.fail(f"{value!r} is no size of a memory", param, ctx)
        return size


def shape_options(function: _F) -> _F:
    """Adds what says which shapes an engine serves."""
    for option in (
        shapes(
            "--dim", "dims", multiple=True, metavar="NAME=RANGE",
            help="Range of another free axis of the graph, such as height=224:224:448.",
        ),
        shapes("--context", metavar="RANGE", help="Filled cache in decode. [1:512:4096]"),
        shapes(
            "--prompt", metavar="RANGE", help="Tokens in a prefill or encoder. [1:512:2048]"
        ),
        shapes("--batch", metavar="RANGE", help="MIN:USUAL:MAX, or one number. [1]"),
        shapes(
            "--split", is_flag=True, help="One engine for each profile, instead of one for all."
        ),
        shapes(
            "--profile", "phases", metavar="PHASE,PHASE",
            help="prefill, decode, encode. [prefill,decode with a cache, else encode]",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


compute_capability_option = engines(
    "--compute-capability", "compute_capabilities", metavar="SM,SM",
    help="TensorRT-RTX: build for these, such as sm80,sm89,sm120.",
)  # fmt: skip

optimization_level_option = engines(
    "--optimization-level",
    type=click.IntRange(0, 5),
    metavar="LEVEL",
    help="0 quick to 5 thorough.",
)


def export_engine_options(function: _F) -> _F:
    """Adds which engines are built on the way of an export."""
    for option in (
        optimization_level_option,
        compute_capability_option,
        engines(
            "--split", is_flag=True,
            help="With --engine: one for each phase; one for both holds the weights twice.",
        ),
        engines(
            "--builds", type=Count(), default=1, show_default=True,
            help="With --engine: so many of each model, since builds may differ.",
        ),
        engines(
            "--engine", type=click.Choice(["tensorrt-rtx", "tensorrt"]),
            help="Build engines of both models too, and compare them.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def capabilities(text: str | None) -> tuple[str, ...]:
    """Reads ``sm80,sm89``.

    Raises:
        click.UsageError: It names none.
    """
    return names(text.lower()) if text else ()


def names(text: str) -> tuple[str, ...]:
    """What stands between commas, each once.

    Raises:
        click.UsageError: Nothing does.
    """
    found = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not found:
        raise click.UsageError(f"{text!r} names nothing.")
    return found


def building_options(function: _F) -> _F:
    """Adds what says how an engine is built."""
    for option in (
        engines("--tf32", is_flag=True, help="Let fp32 products be rounded to TF32."),
        engines("--detailed", is_flag=True, help="Keep the layers' names and shapes."),
        engines("--refittable", is_flag=True, help="Weights can be exchanged later."),
        engines("--strip-weights", is_flag=True, help="Leave the weights out, for a refit."),
        engines(
            "--version-compatible", is_flag=True, help="TensorRT: for later versions too."
        ),
        engines(
            "--hardware-compatibility", default="none", show_default=True,
            type=click.Choice(["none", "ampere+", "same-compute-capability"]),
            help="TensorRT: for other cards too.",
        ),
        engines(
            "--timing-cache", type=ANY_PATH,
            help="TensorRT: remembers timed tactics; the same cache gives like engines.",
        ),
        engines("--workspace", type=Workspace(), help="The most scratch memory, such as 4GB."),
        optimization_level_option,
        compute_capability_option,
    ):  # fmt: skip
        function = option(function)
    return function
