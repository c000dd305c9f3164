"""Loaded engines with a context for each profile; the only code that speaks to a runtime."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

from exporter.engines.build.child import run_job
from exporter.engines.build.cuda import CapturedRun, Cuda
from exporter.engines.build.engine_set import (
    EngineRecord,
    EngineSet,
    Slot,
    other_card,
    refuse_mismatch,
    sidecar_path,
)
from exporter.engines.build.libraries import (
    BINDINGS,
    LIBRARIES,
    Driver,
    ask_driver,
    load,
    refuse_old_driver,
)
from exporter.engines.build.logs import Listener
from exporter.engines.build.settings import End
from exporter.engines.tensors import (
    LESS_MEMORY,
    byte_count,
    bytes_in_words,
    numpy_dtype,
    plan_buffers,
    written_shape,
)
from exporter.errors import OUT_OF_MEMORY, BackendError, DepthcutError, EngineError
from exporter.files import sha256_bytes
from exporter.progress import QUIET
from graph_passes.files.placing import staging
from graph_passes.files.reading import read_bytes

Launches = Literal["kernels", "CUDA graph", "kernels, since no CUDA graph could be captured"]
"""How a run gets on the stream."""


@dataclass(eq=False)
class ReadyProfile:
    """One profile, ready to run.

    What is told again, and is as before, doesn't reach the library.
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
        """Sets every input's shape."""
        for name, shape in shapes.items():
            if name not in self.names or self._shapes.get(name) == tuple(shape):
                continue
            self.forget_run()
            if not self.context.set_input_shape(name, tuple(shape)):
                self._shapes.pop(name, None)
                text = f"refuses the shape {written_shape(shape)} for {name}"
                raise self._failed(text, "wrong-shape")
            self._shapes[name] = tuple(shape)

    def output_shape(self, name: str) -> tuple[int, ...]:
        """An output's shape, once all inputs have one."""
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
        """Puts a run on the stream; as a CUDA graph where one can be captured."""
        if self._graph is None and self._has_run and self.graphs is not None:
            try:
                self._graph = self.graphs(self._execute)
                self.launches = "CUDA graph"
            except BackendError:
                self.graphs = None
                self.launches = "kernels, since no CUDA graph could be captured"
        if self._graph is not None:
            self._graph.launch()
            return
        self._execute()
        self._has_run = True

    def _execute(self) -> None:
        if not self.context.execute_async_v3(self.stream):
            raise self._failed("failed while it ran", self.listener.code("run-failed"))

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


_MOST_BYTES = 1 << 30


class RuntimeCache:
    """One engine's compiled kernels, for all of its contexts; kept, it saves time and no more."""

    def __init__(self, config: Any, path: Path) -> None:
        self.path, self.cache, self._read = path, config.create_runtime_cache(), b""
        with contextlib.suppress(OSError, DepthcutError):
            content = read_bytes(path, limit=_MOST_BYTES)
            if self.cache.deserialize(content):
                self._read = content
            else:  # broken, or of another version
                path.unlink()  # ours; what is of another kind would not be replaced

    def keep(self) -> None:
        """Writes what was compiled since, where that can be."""
        data = self.cache.serialize()
        content = b"" if data is None else bytes(memoryview(data))
        if content in (b"", self._read):
            return
        with contextlib.suppress(OSError, DepthcutError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with staging(self.path) as staged:
                new = staged.folder / "cache"
                new.write_bytes(content)
                staged.place([(new, self.path)])


def cache_path(record: EngineRecord, driver: Driver) -> Path:
    """Where an engine's cache is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    named = (
        record.engine_sha256, record.backend, record.backend_version, driver.cuda_version,
        *(f"{card.name} {card.compute_capability}" for card in driver.devices[:1]),
    )  # fmt: skip
    name = sha256_bytes("\n".join(named).encode())[:32]
    return Path(home) / "depthcut" / "runtime-caches" / f"{name}.bin"


def validity_note(module: ModuleType, runtime: Any, path: Path) -> str:
    """What TensorRT-RTX says of an engine here, if it is not simply valid; refuses an invalid one.

    It knows by the file's first bytes.
    """
    if module.__name__ != LIBRARIES["tensorrt-rtx"].module:
        return ""
    with path.open("rb") as file:
        validity, result = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    if validity == module.EngineValidity.VALID:
        return ""
    flags = module.EngineInvalidityDiagnostics.__members__.items()
    reasons = [name for name, flag in flags if int(result) & int(flag)]
    why = f"{module.__name__} {module.__version__} says {', '.join(reasons) or 'nothing more'}"
    if validity == module.EngineValidity.SUBOPTIMAL:
        return f"{path.name} is slower here than it could be: {why}; build it on this machine"
    raise EngineError(
        f"{path} is not valid here: {why}.",
        "Build it for this card with the library that is installed here; depthcut doctor shows "
        "card and driver.",
        code=OUT_OF_MEMORY if reasons == ["INSUFFICIENT_GPU_MEMORY"] else "invalid-engine",
    )


class Session:
    """Engines between ``__enter__`` and ``__exit__``.

    A profile for a phase in ``engines.steady`` runs as a CUDA graph: TensorRT-RTX makes it by
    itself, of kernels that it compiles for the shapes at once. Other profiles keep to kernels that
    serve every shape, and to no graph.
    """

    def __init__(self, engines: EngineSet) -> None:
        self.engines = engines
        self.notes: list[str] = []  # what a user must know of them
        self._engine_bytes = 0
        self._kept: list[Any] = []
        self._caches: dict[int, RuntimeCache] = {}
        self.profiles: tuple[ReadyProfile, ...] = ()

    def __enter__(self) -> Self:
        """Asks the driver, then loads."""
        module = refuse_unready(self.engines)
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
        """
        plan = plan_buffers([self._bytes(profile, end) for profile in self.profiles])
        aliases = {n: source for item in self.profiles for n, source in item.aliases.items()}
        own = {name: self.cuda.allocate(plan[name], name) for name in plan if name not in aliases}
        for name, address in own.items():
            self.cuda.clear(address, plan[name])
        return {name: own[aliases.get(name, name)] for name in plan}

    def _bytes(self, profile: ReadyProfile, end: End) -> dict[str, int]:
        """Of each input and output, at a profile's smallest or largest shapes."""
        engines = self.engines
        shapes = engines.shapes(profile.slot, end)
        profile.set_shapes(shapes)
        shapes |= {output.name: profile.output_shape(output.name) for output in engines.outputs}
        tensors = (*engines.inputs, *engines.outputs)
        return {t.name: byte_count(numpy_dtype(t.dtype), shapes[t.name]) for t in tensors}

    def _load(self, module: ModuleType) -> None:
        listener, card = Listener(module, errors_only=True), ask_driver().devices[0].name
        runtime = module.Runtime(listener.log)
        self._kept += [listener, runtime]
        for path, record in zip(self.engines.paths, self.engines.records, strict=True):
            self._kept.append(deserialised(module, runtime, listener, path, self.notes))
            self._engine_bytes += weight_bytes(module, self._kept[-1], record)
            self.notes += filter(None, [other_card(record, card)])
        first = len(self._kept) - len(self.engines.paths)
        self.profiles = tuple(
            self._ready(module, slot, first + slot.engine, listener) for slot in self.engines.slots
        )

    def _ready(
        self, module: ModuleType, slot: Slot, place: int, listener: Listener
    ) -> ReadyProfile:
        """A context for a profile of the engine that is kept at a place.

        No variable holds the engine: an error's traceback would hold its memory.
        """
        own_graphs = self.engines.library.compiles_on_card
        steady = slot.profile.phase in self.engines.steady
        scratch = int(self._kept[place].get_device_memory_size_for_profile_v2(slot.number))
        # Memory for this profile alone, not for the largest of the engine.
        how = module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if own_graphs:
            how = self._runtime_config(module, how, slot, place, steady=steady)
        context = self._kept[place].create_execution_context(how)
        stream = int(self.cuda.stream)
        if context is None or not context.set_optimization_profile_async(slot.number, stream):
            del context, how  # as above
            free, total = (bytes_in_words(size) for size in self.cuda.free_bytes())
            raise BackendError(
                f"{self.engines.paths[slot.engine]}: the {slot.profile.phase} profile takes "
                f"{bytes_in_words(scratch)} of scratch memory; {free} of {total} are free: "
                f"{listener.last_error()}",
                LESS_MEMORY,
                code=listener.code("no-context"),
            )
        self.cuda.wait()
        self._kept.append(context)
        self._engine_bytes += scratch
        count = self._kept[place].num_io_tensors
        names = [self._kept[place].get_tensor_name(number) for number in range(count)]
        sources = ((name, self._kept[place].get_aliased_input_tensor(name)) for name in names)
        return ReadyProfile(
            slot, context, frozenset(names), stream, listener,
            aliases={name: source for name, source in sources if source},
            graphs=self.cuda.captured if steady and not own_graphs else None,
            launches="CUDA graph" if steady and own_graphs else "kernels",
        )  # fmt: skip

    def _runtime_config(
        self, module: ModuleType, strategy: Any, slot: Slot, place: int, *, steady: bool
    ) -> Any:
        config = self._kept[place].create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs = module.CudaGraphStrategy
        kernels = module.DynamicShapesKernelSpecializationStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if steady else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = (
            kernels.EAGER if steady else kernels.NONE
        )
        if slot.engine not in self._caches:  # all contexts of an engine share one
            path = cache_path(self.engines.records[slot.engine], ask_driver())
            self._caches[slot.engine] = RuntimeCache(config, path)
        config.set_runtime_cache(self._caches[slot.engine].cache)
        return config


def weight_bytes(module: ModuleType, engine: Any, record: EngineRecord) -> int:
    """What an engine's weights take of the card.

    The library says how large they are. Its file tells more where each of several profiles has its
    own: with TensorRT-RTX 1.7.1 a second profile doubled it.
    """
    number = int(engine.get_engine_stat(module.EngineStat.TOTAL_WEIGHTS_SIZE))
    return max(number, record.engine_bytes)


def deserialised(
    module: ModuleType, runtime: Any, listener: Listener, path: Path, notes: list[str]
) -> Any:
    """Loads one engine; the library reads the file itself, page by page."""
    notes += filter(None, [validity_note(module, runtime, path)])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        code = listener.code("not-loaded")
        again = "Build it again, on this machine where you can."
        raise EngineError(
            f"{path} does not load in {module.__name__} {module.__version__}: "
            f"{listener.last_error()}",
            LESS_MEMORY if code == OUT_OF_MEMORY else again,
            code=code,
        )
    return engine


def refuse_unready(engines: EngineSet) -> ModuleType:
    """Makes sure that there are a driver, a GPU, the library, and that they fit the engines.

    The library's runtime ends the process where there is no driver, so the driver comes first.
    """
    driver = ask_driver()
    if driver.problem:
        raise BackendError(
            f"{engines.name}: built, not run: {driver.problem}.",
            "Run it on a machine with an NVIDIA GPU and its driver.",
            code="no-driver",
        )
    library = engines.library
    refuse_old_driver(driver, library.extra_cuda12, library.backend, BINDINGS)
    module = load(engines.library)
    for record in engines.records:
        refuse_mismatch(record, module.__version__, driver.devices)
    return module


def try_engines(engines: EngineSet) -> None:
    """Runs each profile at its smallest shapes, in a child process, as it will run here.

    An engine that is broken inside, or a card that the library doesn't serve, can end the process
    that loads it. Then it is this one.
    """
    refuse_unready(engines)
    request = {"job": "try", "engines": [str(path.resolve()) for path in engines.paths]}
    try:
        run_job(engines.library, request, QUIET, "try the engine")
    except EngineError as error:
        text = f"{engines.name} can't be run: {error.message}"
        raise EngineError(text, error.hint, code=error.code) from error


def run_once(paths: list[Path]) -> None:
    """What the child process does. The files were held against their records before."""
    records = tuple(EngineRecord.read(sidecar_path(path)) for path in paths)
    with Session(EngineSet(tuple(paths), records)) as session:
        buffers = session.allocate("low")
        for profile in session.profiles:
            for name, address in buffers.items():
                profile.bind(name, address)
            for _ in range(_TRIAL_RUNS):
                profile.enqueue()
                session.cuda.wait()


_TRIAL_RUNS = 3  # the second is captured where graphs are, the third is one
