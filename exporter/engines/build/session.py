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

from exporter.engines.build.child import run_job
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.driver import Device, ask_driver
from exporter.engines.build.engine_set import EngineSet, Slot
from exporter.engines.build.libraries import load, refuse_driver_for_running
from exporter.engines.build.logs import Listener
from exporter.engines.build.settings import End, Phase
from exporter.engines.build.sidecar import EngineRecord, refuse_mismatch, sidecar_path
from exporter.engines.build.validity import refuse_invalid
from exporter.engines.tensors import (
    byte_count,
    bytes_in_words,
    numpy_dtype,
    plan_buffers,
    written_shape,
)
from exporter.errors import BackendError, EngineError
from exporter.progress import QUIET


@dataclass(frozen=True)
class ReadyProfile:
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
                told = f"refuses the shape {written_shape(shape)} for {name}"
                raise self._failed(told, "wrong-shape")

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
            raise self._failed("failed while it ran", "run-failed")

    def _failed(self, what: str, code: str = "") -> BackendError:
        phase, reason = self.slot.profile.phase, self.listener.last_error()
        return BackendError(f"The engine's {phase} {what}: {reason}", code=code)


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
        profiles: Each ready to run; once entered.
        card: The GPU's name; once entered.
    """

    def __init__(self, engines: EngineSet, *, fixed_shapes: bool | Collection[Phase]) -> None:
        self.engines = engines
        self._fixed_shapes = fixed_shapes
        self._free_before = 0
        self._kept: list[Any] = []
        self.profiles: tuple[ReadyProfile, ...] = ()
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
        self.cuda = Cuda(self.engines.library.extra)
        try:
            self._load(module)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees contexts, engines, the runtime, then memory and stream."""
        self.cuda.finish()  # what a context works with must outlive its work
        self.profiles = ()
        while self._kept:  # the last made goes first
            self._kept.pop()
        self.cuda.close()

    @property
    def used_bytes(self) -> int:
        """Device memory that went since it was entered: weights, scratch memory, buffers."""
        return max(0, self._free_before - self.cuda.free_bytes()[0])

    def allocate(self, end: End) -> dict[str, int]:
        """Zeroed device memory for every input and output: one buffer serves all profiles.

        Each profile is then set to these shapes.

        Args:
            end: Whether for the profiles' smallest or for their largest shapes.

        Returns:
            By name, the buffer's address; that of an input, for an output that must lie there.

        Raises:
            BackendError: There is too little memory.
        """
        plan = plan_buffers([self._bytes(profile, end) for profile in self.profiles])
        aliases = {n: source for each in self.profiles for n, source in each.aliases.items()}
        own = {name: self.cuda.allocate(plan[name], name) for name in plan if name not in aliases}
        for name, address in own.items():
            self.cuda.clear(address, plan[name])
        return {name: own[aliases.get(name, name)] for name in plan}

    def _bytes(self, profile: ReadyProfile, end: End) -> dict[str, int]:
        """Of each input and output, at a profile's smallest or largest shapes."""
        engines = self.engines
        shapes = engines.shapes(profile.slot, end)
        profile.set_shapes(shapes)
        shapes |= {each.name: profile.output_shape(each.name) for each in engines.outputs}
        tensors = (*engines.inputs, *engines.outputs)
        return {t.name: byte_count(numpy_dtype(t.dtype), shapes[t.name]) for t in tensors}

    def _load(self, module: ModuleType) -> None:
        self._free_before, _ = self.cuda.free_bytes()
        listener = Listener(module, errors_only=True)
        runtime = module.Runtime(listener.log)
        self._kept.extend((listener, runtime))
        loaded = []
        for path in self.engines.paths:
            loaded.append(deserialised(module, runtime, listener, path))
            self._kept.append(loaded[-1])
        ready = []
        for slot in self.engines.slots:
            engine = loaded[slot.engine]
            context = self._context(module, engine, slot, listener)
            self._kept.append(context)
            names = frozenset(engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
            stream = int(self.cuda.stream)
            ready.append(
                ReadyProfile(slot, context, names, stream, listener, _aliases(engine, names))
            )
        self.profiles = tuple(ready)

    def _context(self, module: ModuleType, engine: Any, slot: Slot, listener: Listener) -> Any:
        # Memory for this profile alone, not for the largest of the engine.
        strategy = module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        how = strategy
        if self.engines.library.compiles_on_card:
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
            f"{path}: the {slot.profile.phase} profile takes {bytes_in_words(asked)} of scratch "
            f"memory; {free} of {total} are free: {listener.last_error()}",
            "Stop other programs on the GPU, or build for a smaller batch or a shorter context.",
        )


def _aliases(engine: Any, names: Iterable[str]) -> dict[str, str]:
    """By output that shares its memory with an input, that input."""
    if not hasattr(engine, "get_aliased_input_tensor"):  # TensorRT before 10.15
        return {}
    found = {name: engine.get_aliased_input_tensor(name) for name in names}
    return {name: source for name, source in found.items() if source}


def deserialised(module: ModuleType, runtime: Any, listener: Listener, path: Path) -> Any:
    """Loads one engine; the library reads the file itself, page by page.

    Raises:
        EngineError: The library doesn't take it; see :func:`refuse_invalid`.
    """
    refuse_invalid(module, runtime, path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"{path} does not load in {module.__name__} {module.__version__}: "
            f"{listener.last_error()}",
            "Build it again, on this machine where you can.",
        )
    return engine


def refuse_unready(engines: EngineSet) -> tuple[ModuleType, Device]:
    """Makes sure that there are a driver, a GPU, the library, and that they fit the engines.

    The library's runtime ends the process where there is no driver, so the driver comes first.

    Returns:
        The library's module, and the GPU that will run.

    Raises:
        BackendError: There is no driver or no GPU, or the driver is too old for the library.
        MissingDependencyError: The library is not installed.
        EngineError: It is another version than the engines', or the GPU is of another kind.
    """
    driver = ask_driver()
    if driver.problem:
        raise BackendError(
            f"{engines.name}: built, not run: {driver.problem}.",
            "Run it on a machine with an NVIDIA GPU and its driver.",
            code="no-driver",
        )
    refuse_driver_for_running(engines.library, driver)
    module = load(engines.library)
    for record in engines.records:
        refuse_mismatch(record, module.__version__, driver.devices)
    return module, driver.devices[0]


def try_engines(engines: EngineSet) -> None:
    """Runs each profile once at its smallest shapes, in a child process.

    An engine that is broken inside, or a card that the library doesn't serve, can end the process
    that loads it. Then it is this one.

    Raises:
        BackendError: There is no driver or no GPU.
        EngineError: The engines don't load or run; also when that process crashes.
    """
    refuse_unready(engines)
    request = {"job": "try", "engines": [str(path.resolve()) for path in engines.paths]}
    try:
        run_job(engines.library, request, QUIET, "try the engine")
    except EngineError as error:
        told = f"{engines.name} can't be run: {error.message}"
        raise EngineError(told, error.hint, code=error.code) from error


def run_once(paths: list[Path]) -> dict[str, Any]:
    """What the child process does. The files were held against their records before.

    Raises:
        BackendError: As :class:`Session`.
        EngineError: Likewise.
    """
    records = tuple(EngineRecord.read(sidecar_path(path)) for path in paths)
    engines = EngineSet(tuple(paths), records)
    with Session(engines, fixed_shapes=False) as session:
        buffers = session.allocate("low")
        for profile in session.profiles:
            for name, address in buffers.items():
                profile.bind(name, address)
            profile.enqueue()
            session.cuda.wait()
        return {"card": session.card}
