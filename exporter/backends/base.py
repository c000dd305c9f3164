"""What every backend offers to the measurements.

A backend's loader returns a runner. The runner takes its memory when it is entered and gives it
back when it is left; in between it runs the model on numpy arrays, or hands out a call that is
bound to its buffers, for timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BoundCall = Callable[[], None]
"""One run of the model on bound inputs, into preallocated outputs."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: Its name in the graph.
        dtype: The numpy dtype; bfloat16 is that of ml_dtypes.
        shape: A number for a static dimension, a name (or None) for a dynamic one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@runtime_checkable
class DeviceTimed(Protocol):
    """A bound call that also knows how long the device took; ask with ``isinstance``."""

    def __call__(self) -> None:
        """Runs once and waits for the device."""

    def device_ms(self) -> float:
        """Milliseconds of the last call between two events on the device's own clock."""


@runtime_checkable
class Bounded(Protocol):
    """A runner that takes shapes within bounds only."""

    def refuse_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses inputs of such shapes.

        Raises:
            BackendError: It says which input is outside, and what would fit.
        """


@runtime_checkable
class OnGpu(Protocol):
    """A runner that knows what it takes of a GPU; ask with ``isinstance``.

    Attributes:
        gpu_memory_bytes: Device memory for weights, scratch memory and buffers, once entered.
    """

    gpu_memory_bytes: int


@runtime_checkable
class MayWiden(Protocol):
    """A runner that may compute in a wider type than its graph does; ask with ``isinstance``.

    Attributes:
        widened: Whether a bfloat16 graph is run in float32, inputs and outputs too; known once it
            was entered.
    """

    widened: bool


@runtime_checkable
class OnHugePages(Protocol):
    """A runner that asks for huge pages; ask with ``isinstance``.

    Attributes:
        huge_page_bytes: Memory of the process that lies there, once the runner was entered.
    """

    huge_page_bytes: int


@runtime_checkable
class PrefillsInChunks(Protocol):
    """A runner that may run a prompt in chunks; ask with ``isinstance``.

    Attributes:
        prefill_chunk_tokens: The fewest tokens of a chunk, known once it was entered: a prompt of
            one row is cut into as many as it has room for. 0 where prompts run whole.
    """

    prefill_chunk_tokens: int


class Runner(Protocol):
    """A model, ready to run between ``__enter__`` and ``__exit__``.

    Attributes:
        backend: The backend's name, such as ``onnxruntime``.
        provider: The device path that really runs, as the backend calls it.
        threads: CPU threads that the backend may use for one operator, from when it is entered on.
        cpu_nodes: Once entered: by operator, how many nodes run on the CPU although another
            provider was asked for. By their operators they compute shapes.
    """

    backend: str
    provider: str
    threads: int
    cpu_nodes: Mapping[str, int]

    def __enter__(self) -> Self:
        """Loads the model.

        Raises:
            BackendError: When it can't be loaded, or not all of its computation runs where it
                was asked to.
        """

    def __exit__(self, *exc_info: object) -> None:
        """Frees the model; does nothing where none is loaded."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, in the graph's order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in the graph's order."""

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Runs once and returns the named outputs, or all of them.

        Raises:
            BackendError: When the run fails.
        """

    def prepare(self, inputs: Mapping[str, Array]) -> BoundCall:
        """Binds inputs and preallocated outputs, so that a call costs the engine's work alone.

        The model runs once to learn the shapes of its outputs.

        Raises:
            BackendError: When that run fails; so does the call that is returned, when it fails.
        """
