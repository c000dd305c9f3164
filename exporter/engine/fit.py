"""Which of an engine's profiles a call fits, and in words why none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exporter.engine.settings import ProfileEntry, ShapeRange
from exporter.engine.tensors import written_shape
from exporter.errors import BackendError

Shapes = Mapping[str, tuple[int, ...]]


def fits(profile: ProfileEntry, shapes: Shapes) -> bool:
    """Whether all shapes lie within a profile. Inputs that it doesn't name have a fixed shape."""
    return all(
        name not in profile.shapes or _within(profile.shapes[name], shape)
        for name, shape in shapes.items()
    )


def choose_profile(name: str, profiles: Sequence[ProfileEntry], shapes: Shapes) -> int:
    """The number of the first profile that a call fits.

    Args:
        name: The engine, for the message.
        profiles: In the engine's order.
        shapes: By input, its shape in this call.

    Raises:
        BackendError: None holds it; an input is told that lies outside, and what would fit.
    """
    for number, profile in enumerate(profiles):
        if fits(profile, shapes):
            return number
    nearest = min(profiles, key=lambda profile: len(_outside(profile, shapes)))
    first = _outside(nearest, shapes)[0]
    raise BackendError(
        f"{name}: no profile holds this call: {first} is {written_shape(shapes[first])}, and "
        f"{_held(profiles, first)}.",
        "Ask for less, or build it with other --batch, --prompt or --context.",
    )


def _outside(profile: ProfileEntry, shapes: Shapes) -> list[str]:
    return [
        name
        for name, shape in shapes.items()
        if name in profile.shapes and not _within(profile.shapes[name], shape)
    ]


def _within(span: ShapeRange, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(span.low) and all(
        low <= size <= high for low, size, high in zip(span.low, shape, span.high, strict=True)
    )


def _held(profiles: Sequence[ProfileEntry], name: str) -> str:
    told = [
        f"{profile.phase} takes {_written(profile.shapes[name])}"
        for profile in profiles
        if name in profile.shapes
    ]
    return ", ".join(told)


def _written(span: ShapeRange) -> str:
    low, high = written_shape(span.low), written_shape(span.high)
    return low if low == high else f"{low} to {high}"
