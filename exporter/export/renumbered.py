"""A graph's caches under the numbers that its layers have in a shallower model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from exporter.engines.runners.base import Array, Runner
from exporter.engines.tensors import TensorSpec

_CACHE = re.compile(r"(past_key_values|present)\.([0-9]{1,4})\.(key|value)")


class RenumberedCaches:
    """A runner under a shallower model's numbers: the caches of its layers count from 0.

    Args:
        runner: It is entered and left by whoever made it.
        layers: The numbers that its graph has, in order.
    """

    def __init__(self, runner: Runner, layers: Sequence[int]) -> None:
        self._runner = runner
        self._inner = dict(enumerate(layers))
        self._outer = {old: new for new, old in self._inner.items()}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's, renamed."""
        return tuple(map(self._outside, self._runner.inputs))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's, renamed."""
        return tuple(map(self._outside, self._runner.outputs))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph once and returns all outputs."""
        given = {_renamed(name, self._inner): value for name, value in inputs.items()}
        found = self._runner.run(given)
        return {_renamed(name, self._outer): value for name, value in found.items()}

    def _outside(self, spec: TensorSpec) -> TensorSpec:
        return replace(spec, name=_renamed(spec.name, self._outer))


def _renamed(name: str, numbers: Mapping[int, int]) -> str:
    found = _CACHE.fullmatch(name)
    if found is None:
        return name
    # A layer that should not be there must not be taken for one that has its number now.
    number = numbers.get(int(found[2]), f"cut{found[2]}")
    return f"{found[1]}.{number}.{found[3]}"
