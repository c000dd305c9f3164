"""Loaded engines with their contexts, one for each profile; the only code that speaks to a runtime.

What stands here has never run where this project's CI runs, which has no GPU: ``tests/gpu`` runs
it. So it decides little: shapes, sizes and messages are made in modules that need no device.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from exporter.engine.buffers import bytes_in_words
from exporter.engine.cuda import Cuda
from exporter.engine.engine_set import EngineSet, Slot
from exporter.engine.guard import refuse_unready
from exporter.engine.network import Listener
from exporter.engine.profiles import Phase
from exporter.engine.tensors import written_shape
from exporter.errors import BackendError, EngineError


@dataclass(frozen=True)
class Lane:
    """One profile, ready to run.

    Attributes:
        slot: Which profile of which engine.
        context: The library's execution context.
        names: The inputs and outputs that the engine has. A builder may leave out an input that
            nothing uses; what is said of it is passed over.
        stream: The stream's number.
        listener: Hears why something fails.
        aliases: By output that must lie where an input does, that input: a cache in place.
    """

    slot: Slot
    context: Any
    names: frozenset[str]
    stream: int
    listener: Listener
    aliases: Mapping[str, str] = field(default_factory=dict)

    def set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sets every input's shape.

        Raises:
            BackendError: The library refuses one.
        """
        for name, shape in shapes.items():
            if name in self.names and not self.context.set_input_shape(name, tuple(shape)):
                raise self._failed(f"refuses the shape {written_shape(shape)} for {name}")

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
        if name in self.names and not self.context.set_tensor_address(name, address):
            raise self._failed(f"does not take the address of {name}")

    def enqueue(self) -> None:
        """Puts a run on the stream.

        Raises:
            BackendError: The library refuses.
        """
        if not self.context.execute_async_v3(self.stream):
            raise self._failed("failed while it ran")

    def _failed(self, what: str) -> BackendError:
        phase, reason = self.slot.profile.phase, self.listener.last_error()
        return BackendError(f"The engine's {phase} {what}: {reason}")


class Session:
    """Engines between ``__enter__`` and ``__exit__``.

    Args:
        engines: Which.
        fixed_shapes: Whether each profile is run at one shape again and again; or the phases whose
            profiles are. TensorRT-RTX then compiles its kernels for it at once and runs them as a
            CUDA graph. Else it keeps to kernels that serve every shape: a growing cache brings a
            new one at every step.

    Attributes:
        engines: The same.
        cuda: Stream and memory; once entered.
        lanes: A lane for each profile; once entered.
        card: The GPU's name; once entered.
    """

    def __init__(self, engines: EngineSet, *, fixed_shapes: bool | Collection[Phase]) -> None:
        self.engines = engines
        self._fixed_shapes = fixed_shapes
        self._free_before = 0
        self._kept: list[Any] = []
        self.lanes: tuple[Lane, ...] = ()
        self.card = ""

    def __enter__(self) -> Self:
        """Asks the driver, then loads.

        Raises:
            BackendError: No driver, no GPU, too little memory.
            EngineError: The engines are not for this machine, or don't load.
            MissingDependencyError: A library is not installed.
        """
        module, device = refuse_unready(self.engines)
        self.card = device.name
        self.cuda = Cuda(self.engines.flavour.extra)
        try:
            self._load(module)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees contexts, engines, the runtime, then memory and stream."""
        self.cuda.finish()  # what a context works with must outlive its work
        self.lanes = ()
        while self._kept:  # the last made goes first
            self._kept.pop()
        self.cuda.close()

    @property
    def used_bytes(self) -> int:
        """Device memory that went since it was entered: weights, scratch memory, buffers."""
        return max(0, self._free_before - self.cuda.free_bytes()[0])

    def _load(self, module: ModuleType) -> None:
        self._free_before, _ = self.cuda.free_bytes()
        listener = Listener(module, errors_only=True)
        runtime = module.Runtime(listener.log)
        self._kept.extend((listener, runtime))
        loaded = []
        for path in self.engines.paths:
            loaded.append(deserialised(module, runtime, listener, path))
            self._kept.append(loaded[-1])
        lanes = []
        for slot in self.engines.slots:
            engine = loaded[slot.engine]
            context = self._context(module, engine, slot, listener)
            self._kept.append(context)
            names = frozenset(engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
            stream = int(self.cuda.stream)
            lanes.append(Lane(slot, context, names, stream, listener, _aliases(engine, names)))
        self.lanes = tuple(lanes)

    def _context(self, module: ModuleType, engine: Any, slot: Slot, listener: Listener) -> Any:
        # Memory for this profile alone, not for the largest of the engine.
        strategy = module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        how = strategy
        if self.engines.flavour.compiles_on_card:
            how = self._runtime_config(module, engine, strategy, slot.profile.phase)
        context = engine.create_execution_context(how)
        made = context is not None and context.set_optimization_profile_async(
            slot.number, int(self.cuda.stream)
        )
        if not made:
            raise self._no_context(engine, slot, listener)
        self.cuda.wait()
        return context

    def _runtime_config(self, module: ModuleType, engine: Any, strategy: Any, phase: Phase) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs, kernels = (
            module.CudaGraphStrategy,
            module.DynamicShapesKernelSpecializationStrategy,
        )
        told = self._fixed_shapes
        fixed = told if isinstance(told, bool) else phase in told
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if fixed else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = (
            kernels.EAGER if fixed else kernels.NONE
        )
        return config

    def _no_context(self, engine: Any, slot: Slot, listener: Listener) -> BackendError:
        path = self.engines.paths[slot.engine]
        asked = engine.get_device_memory_size_for_profile_v2(slot.number)
        free, total = (bytes_in_words(size) for size in self.cuda.free_bytes())
        return BackendError(
            f"{path}: no context for {slot.profile.phase}, which takes {bytes_in_words(asked)} of "
            f"scratch memory; {free} of {total} are free: {listener.last_error()}",
            "End what else runs on the GPU, or build for a smaller batch or a shorter context.",
        )


def _aliases(engine: Any, names: Iterable[str]) -> dict[str, str]:
    """By output that shares its memory with an input, that input."""
    if not hasattr(engine, "get_aliased_input_tensor"):  # TensorRT before 10.15
        return {}
    found = {name: engine.get_aliased_input_tensor(name) for name in names}
    return {name: source for name, source in found.items() if source}


def deserialised(module: ModuleType, runtime: Any, listener: Listener, path: Path) -> Any:
    """Loads one engine; the library reads the file itself, page by page.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        runtime: Its runtime.
        listener: Hears why it fails.
        path: The file.

    Raises:
        EngineError: The library doesn't take it.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"{path} does not load in {module.__name__} {module.__version__}: "
            f"{listener.last_error()}",
            "Build it again, on this machine where you can.",
        )
    return engine
