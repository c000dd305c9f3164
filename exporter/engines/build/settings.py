"""What an engine is to be built with; plain data that passes to the building process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from exporter.artifacts import Record
from exporter.engines.build.tensors import written_shape

Phase = Literal["prefill", "decode", "encode"]
End = Literal["low", "usual", "high"]
Compatibility = Literal["none", "ampere+", "same-compute-capability"]


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

    def outside(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The inputs whose shape it doesn't hold; one that it doesn't name has a fixed shape."""
        return [
            name
            for name, shape in shapes.items()
            if name in self.shapes and not self.shapes[name].holds(shape)
        ]


class BuildSettings(Record):
    """How an engine is built; what is None is left to the library.

    Attributes:
        compute_capabilities: Such as ``sm80``; empty for the library's own choice. TensorRT-RTX
            only; TensorRT builds for the card that is there.
        optimization_level: 0 (quick) to 5 (thorough).
        workspace_bytes: The most scratch memory that a kernel may ask for.
        hardware_compatibility: TensorRT only.
        version_compatible: Whether later versions may load it. TensorRT only.
        strip_weights: Leaves the weights out; they are put in again by a refit.
        refittable: Whether weights can be exchanged later.
        tf32: Whether fp32 products may be rounded to TF32 on the way; off, since it would make the
            engine another model than the graph.
        detailed: Whether the engine keeps the names and shapes of its layers.
    """

    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_bytes: int | None = Field(default=None, gt=0)
    hardware_compatibility: Compatibility = "none"
    version_compatible: bool = False
    strip_weights: bool = False
    refittable: bool = False
    tf32: bool = False
    detailed: bool = False
