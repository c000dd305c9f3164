"""Inputs and outputs that are bound to memory, for runs that allocate nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.engines.runners.base import Array


@dataclass(frozen=True)
class Bound:
    """A binding with the arrays whose memory it only borrows, for as long as it is used.

    Attributes:
        binding: Of inputs, and of outputs once it is settled.
        values: What the inputs are bound to.
        arrays: The memory of values on the CPU.
    """

    binding: Any
    values: dict[str, Any]
    arrays: list[Array]

    def add(self, name: str, value: Any, array: Array) -> None:
        """Binds one more input."""
        self.values[name] = value
        self.arrays.append(array)
        self.binding.bind_ortvalue_input(name, value)

    def settle(
        self, session: Any, outputs: Sequence[str], shared: Mapping[str, str], device: str
    ) -> None:
        """Runs once; the outputs' buffers are then those of all later runs.

        Args:
            session: Whose binding it is.
            outputs: What is wanted.
            shared: By output, the input in whose buffer it is to lie.
            device: Where the others are to lie.
        """
        for name in outputs:
            if name in shared:
                self.binding.bind_ortvalue_output(name, self.values[shared[name]])
            else:
                self.binding.bind_output(name, device)
        session.run_with_iobinding(self.binding)
        for name, value in zip(outputs, self.binding.get_outputs(), strict=True):
            self.binding.bind_ortvalue_output(name, value)
