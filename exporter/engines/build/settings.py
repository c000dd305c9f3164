"""What an engine is to be built with; plain data that passes to the building process."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from exporter.artifacts import Record
from exporter.engines.tensors import written_shape
from exporter.option_types import Engine, Integer, Names, Size, Written
from exporter.options import Options, dataclass, option

Phase = Literal["prefill", "decode", "encode"]
End = Literal["low", "usual", "high"]
ENGINES = "Engines"
Capabilities = Annotated[
    Names,
    AfterValidator(lambda names: tuple(name.lower() for name in names)),
    Written("SM,SM", listed=True),
]
Logits = Literal["last", "all"]
_FAR = 4  # times the values that kernels were chosen for


class ShapeRange(Record):
    """An input's smallest, usual and largest shape in a profile."""

    low: tuple[int, ...]
    usual: tuple[int, ...]
    high: tuple[int, ...]

    def at(self, end: End) -> tuple[int, ...]:
        """One of the three."""
        return {"low": self.low, "usual": self.usual, "high": self.high}[end]

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape lies within."""
        return len(shape) == len(self.low) and all(
            low <= size <= high for low, size, high in zip(self.low, shape, self.high, strict=True)
        )

    def __str__(self) -> str:
        low, high = written_shape(self.low), written_shape(self.high)
        return low if low == high else f"{low} to {high}"


class Profile(Record):
    """One optimisation profile of an engine; its number is its place."""

    phase: Phase
    shapes: dict[str, ShapeRange]

    @property
    def looseness(self) -> tuple[int, int]:
        """How many of the inputs' sizes are free, and the values of all inputs at the largest."""
        spans = self.shapes.values()
        free = sum(
            low < high for span in spans for low, high in zip(span.low, span.high, strict=True)
        )
        return free, sum(math.prod(span.high) for span in spans)

    def far_from_usual(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The first input that has far more values than the profile is tuned for, or far fewer."""
        for name, span in self.shapes.items():
            values, usual = math.prod(shapes[name]), math.prod(span.usual)
            if values and usual and max(values / usual, usual / values) >= _FAR:
                here, there = written_shape(shapes[name]), written_shape(span.usual)
                return f"{self.phase} runs {name} at {here}, and is tuned for {there}"
        return ""

    def outside(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The inputs whose shape it doesn't hold; one that it doesn't name has a fixed shape."""
        return [
            name
            for name, shape in shapes.items()
            if name in self.shapes and not self.shapes[name].holds(shape)
        ]


@dataclass(frozen=True)
class EngineOption(Options):
    """Which library builds."""

    engine: Engine | None = option(
        None,
        "Which library to build with; TensorRT needs the GPU that will run the engine.",
        usual="tensorrt-rtx; tensorrt on a GPU that it does not support",
        section=ENGINES,
    )


@dataclass(frozen=True)
class BuildSettings(Options):
    """How an engine is built; what is None is left to the library."""

    section = ENGINES
    compute_capabilities: Capabilities = option(
        (), "TensorRT-RTX: build for these GPUs, such as sm80,sm89,sm120.", "--compute-capability"
    )
    optimization_level: Annotated[Integer, Field(ge=0, le=5), Written("LEVEL")] | None = option(
        None, "0 quick to 5 thorough.", config_only=True
    )
    workspace_bytes: Annotated[Size, Field(gt=0, lt=1 << 63)] | None = option(
        None,
        "Maximum scratch memory, such as 4GB.",
        "--workspace",
        metavar="SIZE",
        config_only=True,
    )
    logits: Logits = option(
        "last",
        "Logits of a prompt that a decoder's engine gives: of the last position, or of all, as "
        "measures of accuracy need them; with all, a prompt may have a past and padding.",
        rare=True,
    )

    def kept(self, phases: Collection[Phase]) -> Logits:
        """The positions that an engine for some phases gives logits of."""
        return "all" if "encode" in phases else self.logits
