"""One profile of a loaded engine: shapes, addresses, and how a run gets on the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from exporter.engines.build.cuda import CapturedRun
from exporter.engines.build.engine_set import Slot
from exporter.engines.build.logs import Listener
from exporter.engines.tensors import LESS_MEMORY, written_shape
from exporter.errors import OUT_OF_MEMORY, BackendError

Launches = Literal["kernels", "CUDA graph", "kernels, since no CUDA graph could be captured"]
"""How a run gets on the stream."""


@dataclass(eq=False)
class ReadyProfile:
    """One profile, ready to run.

    What is told again, and is as before, doesn't reach the library.

    Attributes:
        slot: Which profile of which engine.
        context: The library's execution context.
        names: The inputs and outputs that the engine has. A builder may leave out an input that
            nothing uses; what is said of it is passed over.
        stream: The stream's number.
        listener: Hears why something fails.
        aliases: By output that must lie where an input does, that input: a cache in place.
        graphs: Captures a run as a CUDA graph, where one is wanted and the library makes none by
            itself: the second run with the same shapes and addresses is captured.
        launches: How a run is put on the stream.
    """

    slot: Slot
    context: Any
    names: frozenset[str]
    stream: int
    listener: Listener
    aliases: Mapping[str, str] = field(default_factory=dict)
    graphs: Callable[[Callable[[], None]], CapturedRun] | None = None
    launches: Launches = "kernels"
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _addresses: dict[str, int] = field(default_factory=dict)
    _has_run: bool = False
    _graph: CapturedRun | None = None

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sets every input's shape.

        Raises:
            BackendError: The library refuses one.
        """
        for name, shape in shapes.items():
            if name not in self.names or self._shapes.get(name) == tuple(shape):
                continue
            self.forget_run()
            if not self.context.set_input_shape(name, tuple(shape)):
                self._shapes.pop(name, None)
                told = f"refuses the shape {written_shape(shape)} for {name}"
                raise self._failed(told, "wrong-shape")
            self._shapes[name] = tuple(shape)

    def output_shape(self, name: str) -> tuple[int, ...]:
        """An output's shape, once all inputs have one.

        Raises:
            BackendError: It depends on values.
        """
        try:
            missing = self.context.infer_shapes()
        except RuntimeError as error:  # the one call of a context that raises
            raise self._failed(f"can't tell the shape of {name}") from error
        shape = tuple(self.context.get_tensor_shape(name))
        if missing or min(shape, default=0) < 0:
            raise self._failed(f"can't tell the shape of {name} before it runs")
        return shape

    def bind(self, name: str, address: int) -> None:
        """Tells where a tensor lies."""
        if name not in self.names or self._addresses.get(name) == address:
            return
        self.forget_run()
        if not self.context.set_tensor_address(name, address):
            raise self._failed(f"does not take the address of {name}")
        self._addresses[name] = address

    def enqueue(self) -> None:
        """Puts a run on the stream.

        Raises:
            BackendError: The library refuses.
        """
        if self._graph is None and self._has_run and self.graphs is not None:
            self._capture(self.graphs)
        if self._graph is not None:
            self._graph.launch()
            return
        self._execute()
        self._has_run = True

    def _execute(self) -> None:
        if not self.context.execute_async_v3(self.stream):
            raise self._failed("failed while it ran", self.listener.code("run-failed"))

    def _capture(self, graphs: Callable[[Callable[[], None]], CapturedRun]) -> None:
        """Captures a run; where that can't be, runs go on as they were."""
        try:
            self._graph = graphs(self._execute)
            self.launches = "CUDA graph"
        except BackendError:
            self.graphs = None
            self.launches = "kernels, since no CUDA graph could be captured"

    def forget_run(self) -> None:
        """A graph holds the shapes and addresses of its capture: others take another."""
        self._has_run = False
        if self._graph is not None:
            self._graph.free()
            self._graph = None

    def _failed(self, what: str, code: str = "") -> BackendError:
        phase, reason = self.slot.profile.phase, self.listener.last_error()
        hint = LESS_MEMORY if code == OUT_OF_MEMORY else ""
        return BackendError(f"The engine's {phase} {what}: {reason}", hint, code=code)
