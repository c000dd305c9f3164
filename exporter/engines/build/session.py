"""Loaded engines with their contexts, one for each profile; the only code that speaks to a runtime.

What stands here has never run where this project's CI runs, which has no GPU: ``tests/gpu`` runs
it. So it decides little: shapes, sizes and messages are made in modules that need no device.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from exporter.engines.build.child import run_job
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.driver import Device, ask_driver
from exporter.engines.build.engine_set import EngineSet, Slot
from exporter.engines.build.libraries import load, refuse_driver_for_running
from exporter.engines.build.logs import Listener
from exporter.engines.build.ready import ReadyProfile
from exporter.engines.build.runtime_cache import RuntimeCache
from exporter.engines.build.settings import End
from exporter.engines.build.sidecar import EngineRecord, refuse_mismatch, sidecar_path
from exporter.engines.build.validity import refuse_invalid
from exporter.engines.tensors import (
    LESS_MEMORY,
    byte_count,
    bytes_in_words,
    numpy_dtype,
    plan_buffers,
)
from exporter.errors import OUT_OF_MEMORY, BackendError, EngineError
from exporter.progress import QUIET

_TRIAL_RUNS = 3  # the second is captured where graphs are, the third is one


class Session:
    """Engines between ``__enter__`` and ``__exit__``.

    A profile for a phase in ``engines.steady`` runs as a CUDA graph: TensorRT-RTX makes it by
    itself, of kernels that it compiles for the shapes at once. Other profiles keep to kernels that
    serve every shape, and to no graph.

    Args:
        engines: Which.

    Attributes:
        engines: The same.
        cuda: Stream and memory; once entered.
        profiles: Each ready to run; once entered.
        card: The GPU's name; once entered.
        notes: What its user must know.
    """

    def __init__(self, engines: EngineSet) -> None:
        self.engines = engines
        self.notes: list[str] = []
        self._engine_bytes = 0
        self._kept: list[Any] = []
        self._loaded: list[Any] = []
        self._caches: dict[int, RuntimeCache] = {}
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
        """Keeps what was compiled; frees contexts, engines, the runtime, memory and stream."""
        self.cuda.finish()  # what a context works with must outlive its work
        for cache in self._caches.values():
            cache.keep()
        for profile in self.profiles:
            profile.context = None  # whoever still holds the profile holds no memory of the card
        self.profiles, self._caches = (), {}
        self._loaded.clear()
        while self._kept:  # the last made goes first
            self._kept.pop()
        self.cuda.close()

    def back_to(self, before: Collection[tuple[str, int]]) -> None:
        """Gives back what was taken of :class:`Cuda` since, and the graphs that lie on it."""
        for profile in self.profiles:
            profile.forget_run()
        self.cuda.back_to(before)

    @property
    def used_bytes(self) -> int:
        """Device memory of weights and scratch, as the engines say, and of own buffers."""
        return self._engine_bytes + self.cuda.allocated_bytes

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
        listener = Listener(module, errors_only=True)
        runtime = module.Runtime(listener.log)
        self._kept.extend((listener, runtime))
        for path, record in zip(self.engines.paths, self.engines.records, strict=True):
            allow_host_code(runtime, record)
            self._loaded.append(deserialised(module, runtime, listener, path))
            self._engine_bytes += weight_bytes(module, self._loaded[-1], record)
            self._kept.append(self._loaded[-1])
        self.profiles = tuple(self._ready(module, slot, listener) for slot in self.engines.slots)

    def _engine(self, slot: Slot) -> Any:
        """A slot's engine; kept in no variable, or an error's traceback would hold its memory."""
        return self._loaded[slot.engine]

    def _ready(self, module: ModuleType, slot: Slot, listener: Listener) -> ReadyProfile:
        context = self._context(module, slot, listener)
        self._kept.append(context)
        self._engine_bytes += self._scratch_bytes(slot)
        count = self._engine(slot).num_io_tensors
        names = frozenset(self._engine(slot).get_tensor_name(number) for number in range(count))
        own_graphs = self.engines.library.compiles_on_card
        steady = slot.profile.phase in self.engines.steady
        aliases = _aliases(self._engine(slot), names)
        return ReadyProfile(
            slot, context, names, int(self.cuda.stream), listener, aliases,
            graphs=self.cuda.captured if steady and not own_graphs else None,
            launches="CUDA graph" if steady and own_graphs else "kernels",
        )  # fmt: skip

    def _scratch_bytes(self, slot: Slot) -> int:
        return int(self._engine(slot).get_device_memory_size_for_profile_v2(slot.number))

    def _context(self, module: ModuleType, slot: Slot, listener: Listener) -> Any:
        # Memory for this profile alone, not for the largest of the engine.
        strategy = module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        how = strategy
        if self.engines.library.compiles_on_card:
            how = self._runtime_config(module, strategy, slot)
        context = self._engine(slot).create_execution_context(how)
        made = context is not None and context.set_optimization_profile_async(
            slot.number, int(self.cuda.stream)
        )
        if not made:
            del context, how  # as in _engine
            raise self._no_context(slot, listener)
        self.cuda.wait()
        return context

    def _runtime_config(self, module: ModuleType, strategy: Any, slot: Slot) -> Any:
        config = self._engine(slot).create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs, kernels = (
            module.CudaGraphStrategy,
            module.DynamicShapesKernelSpecializationStrategy,
        )
        steady = slot.profile.phase in self.engines.steady
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if steady else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = (
            kernels.EAGER if steady else kernels.NONE
        )
        config.set_runtime_cache(self._cache(config, slot.engine).cache)
        return config

    def _cache(self, config: Any, engine: int) -> RuntimeCache:
        """The one that all contexts of an engine share."""
        if engine not in self._caches:
            record = self.engines.records[engine]
            self._caches[engine] = RuntimeCache.open(config, record, ask_driver())
            self.notes += filter(None, [self._caches[engine].problem])
        return self._caches[engine]

    def _no_context(self, slot: Slot, listener: Listener) -> BackendError:
        path = self.engines.paths[slot.engine]
        asked = self._scratch_bytes(slot)
        free, total = (bytes_in_words(size) for size in self.cuda.free_bytes())
        return BackendError(
            f"{path}: the {slot.profile.phase} profile takes {bytes_in_words(asked)} of scratch "
            f"memory; {free} of {total} are free: {listener.last_error()}",
            LESS_MEMORY,
            code=listener.code("no-context"),
        )


def allow_host_code(runtime: Any, record: EngineRecord) -> None:
    """Lets a runtime take an engine that holds code for the host, as one for later versions does.

    Such code runs here, so no other engine may bring any.
    """
    runtime.engine_host_code_allowed = record.settings.version_compatible


def weight_bytes(module: ModuleType, engine: Any, record: EngineRecord) -> int:
    """What an engine's weights take of the card.

    The library says how large they are. Its file tells more where each of several profiles has its
    own: with TensorRT-RTX 1.7.1 a second profile doubled it.
    """
    told = int(engine.get_engine_stat(module.EngineStat.TOTAL_WEIGHTS_SIZE))
    return max(told, record.engine_bytes)


def _aliases(engine: Any, names: Iterable[str]) -> dict[str, str]:
    """By output that shares its memory with an input, that input."""
    found = {name: engine.get_aliased_input_tensor(name) for name in names}
    return {name: source for name, source in found.items() if source}


def deserialised(module: ModuleType, runtime: Any, listener: Listener, path: Path) -> Any:
    """Loads one engine; the library reads the file itself, page by page.

    Raises:
        EngineError: The library doesn't take it, see :func:`refuse_invalid`, or there is too little
            memory for it.
    """
    refuse_invalid(module, runtime, path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        code = listener.code("not-loaded")
        raise EngineError(
            f"{path} does not load in {module.__name__} {module.__version__}: "
            f"{listener.last_error()}",
            LESS_MEMORY
            if code == OUT_OF_MEMORY
            else "Build it again, on this machine where you can.",
            code=code,
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
    """Runs each profile at its smallest shapes, in a child process, as it will run here.

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
    with Session(engines) as session:
        buffers = session.allocate("low")
        for profile in session.profiles:
            for name, address in buffers.items():
                profile.bind(name, address)
            for _ in range(_TRIAL_RUNS):
                profile.enqueue()
                session.cuda.wait()
        return {"card": session.card}
