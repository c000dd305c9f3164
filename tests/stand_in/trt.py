"""The runtimes of TensorRT and TensorRT-RTX on a machine, by the names of their Python modules."""

from __future__ import annotations

import enum
import hashlib
import json
import weakref
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import byte_count
from tests.stand_in.engine_files import VERSIONS, EngineFile, GraphEnds, read_engine
from tests.stand_in.faults import computed
from tests.stand_in.machine import ALIGNED, Machine, RuleError, Work

Shapes = dict[str, tuple[int, ...]]
COMPILE_US = 2e6
GENERIC = 1.5
"""How many times longer kernels take that serve every shape."""

Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
Kernels = enum.Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")
Allocation = enum.Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)
EngineValidity = enum.Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
Diagnostics = enum.IntFlag("EngineInvalidityDiagnostics", "VERSION_MISMATCH UNSUPPORTED_CC")
EngineStat = enum.Enum("EngineStat", "TOTAL_WEIGHTS_SIZE STRIPPED_WEIGHTS_SIZE")


class ILogger:
    """What hears; users write ``log``."""

    Severity = Severity


@dataclass(frozen=True)
class Run:
    """A run of an engine."""

    profile: int
    shapes: Shapes
    as_graph: bool
    generic: bool


class Runtime:
    """Loads engines; TensorRT-RTX's can be asked before."""

    engine_header_size = 64

    def __init__(self, machine: Machine, logger: ILogger) -> None:
        self._machine, self._logger = machine, logger

    def error(self, text: str) -> None:
        """Tells the logger."""
        self._logger.log(Severity.ERROR, f"[stand_in.cpp::said::1] {text}")  # type: ignore[attr-defined]

    def deserialize_cuda_engine(self, content: Any) -> ICudaEngine | None:
        """None where it is no engine, or there is no room."""
        machine, data = self._machine, bytes(content)
        file = read_engine(data)
        machine.calls["deserialize_cuda_engine"] += 1
        if file is None:
            return self.error("Error Code 4: the magic tag doesn't match")
        if not machine.take(file.weights_bytes, "weights"):
            return self.error("Error Code 1: Cuda Runtime (out of memory)")
        return ICudaEngine(self, machine, file, hashlib.sha256(data).hexdigest())

    def get_engine_validity(self, header: bytes) -> tuple[EngineValidity, int]:
        """As the machine is told to answer."""
        return EngineValidity[self._machine.validity], 2


@lru_cache(4)
def _session(onnx: Path) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(onnx, threads=1).__enter__()


class ICudaEngine:
    """A loaded engine."""

    def __init__(self, runtime: Runtime, machine: Machine, file: EngineFile, sha256: str) -> None:
        self.runtime, self.machine, self.file, self.sha256 = runtime, machine, file, sha256
        graph, self.adapted = file.built()
        self.ends = GraphEnds.of(graph)
        self.names = list(self.ends.tensors)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(file.profiles)
        self.held: weakref.WeakValueDictionary[int, IExecutionContext] = (
            weakref.WeakValueDictionary()
        )
        weakref.finalize(self, machine.give, file.weights_bytes, "weights")

    @cached_property
    def graph(self) -> OnnxRuntimeRunner:
        """What computes."""
        return _session(self.file.built(self.file.fault)[0])

    def get_tensor_name(self, number: int) -> str:
        return self.names[number]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.ends.tensors[name][1])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.ends.aliases.get(name)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.file.scratch_bytes

    def get_engine_stat(self, stat: EngineStat = EngineStat.TOTAL_WEIGHTS_SIZE) -> int:
        return self.file.weights_bytes if stat is EngineStat.TOTAL_WEIGHTS_SIZE else -1

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self)

    def create_execution_context(self, how: Any = Allocation.STATIC) -> IExecutionContext | None:
        """Compiles what no runtime cache knows, where kernels are compiled on the card."""
        config = how if isinstance(how, IRuntimeConfig) else None
        if config is not None:
            config.compile(("engine", self.sha256))
        return IExecutionContext(self, config)


class IRuntimeCache:
    """What was compiled, for this version, card and driver."""

    def __init__(self, machine: Machine) -> None:
        self._place = [VERSIONS["tensorrt-rtx"], machine.name, machine.driver // 1000]
        self.known: set[str] = set()

    def deserialize(self, blob: Any) -> bool:
        try:
            content = json.loads(bytes(blob))
        except ValueError:
            return False
        if content["place"] != self._place:
            return False
        self.known = set(content["known"])
        return True

    def serialize(self) -> bytes:
        return json.dumps({"place": self._place, "known": sorted(self.known)}).encode()


class IRuntimeConfig:
    """How a context runs; TensorRT-RTX alone has it."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._machine = engine.machine
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Kernels.LAZY
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._machine)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def compile(self, what: Any) -> None:
        """Takes its time, but for what the cache knows."""
        known = set() if self._cache is None else self._cache.known
        key = json.dumps(what)
        if key not in known:
            self._machine.calls["compiled"] += 1
            self._machine.host_us += COMPILE_US
            known.add(key)


@dataclass(eq=False)
class IExecutionContext:
    """Runs an engine at one of its profiles."""

    engine: ICudaEngine
    config: IRuntimeConfig | None
    active_optimization_profile: int = -1
    _chosen_on: int | None = None
    _shapes: Shapes = field(default_factory=dict)
    _addresses: dict[str, int] = field(default_factory=dict)
    _ran_at: Shapes | None = None
    _captured: Any = None
    _specialised: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._fixed = {
            name: self.engine.get_tensor_shape(name)
            for name in self.engine.ends.inputs
            if -1 not in self.engine.get_tensor_shape(name)
        }

    @property
    def _machine(self) -> Machine:
        return self.engine.machine

    def _refuse(self, text: str) -> bool:
        self.engine.runtime.error(text)
        return False

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        """All shapes have to be set again; the memory of the profile is taken."""
        machine, engine = self._machine, self.engine
        machine.break_captures()
        if not 0 <= number < engine.num_optimization_profiles:
            return self._refuse(f"there is no profile {number}")
        if number in engine.held:
            return self._refuse(f"profile {number} is held by another context")
        if self.active_optimization_profile < 0:
            if not machine.take(engine.file.scratch_bytes, "scratch"):
                return self._refuse("Error Code 2: OutOfMemory (no further information)")
            weakref.finalize(self, machine.give, engine.file.scratch_bytes, "scratch")
        else:
            del engine.held[self.active_optimization_profile]
        engine.held[number] = self
        self.active_optimization_profile, self._shapes, self._ran_at = number, {}, None

        def done() -> None:
            self._chosen_on = None

        self._chosen_on = stream
        machine.put(machine.streams[stream], Work(done, 1.0))
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._machine.calls["set_input_shape"] += 1
        if name not in self.engine.ends.inputs or self.active_optimization_profile < 0:
            return self._refuse(f"{name} is no input, or no profile is chosen")
        low, high = self.engine.file.profiles[self.active_optimization_profile][name]
        if len(shape) != len(low) or not all(
            small <= size <= large for small, size, large in zip(low, shape, high, strict=True)
        ):
            return self._refuse(f"the shape {shape} of {name} is not within {low} to {high}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._machine.calls["set_tensor_address"] += 1
        if name not in self.engine.names:
            return self._refuse(f"there is no tensor {name}")
        if address % ALIGNED:
            raise RuleError(f"The address of {name} is no multiple of {ALIGNED}.")
        self._addresses[name] = address
        return True

    @property
    def _all_shapes(self) -> Shapes:
        return {**self._fixed, **self._shapes}

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.ends.inputs if name not in self._all_shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shapes = self._all_shapes
        if name not in self.engine.ends.inputs and not self.infer_shapes():
            return self.engine.ends.output_shape(name, shapes)
        return shapes.get(name, tuple(-1 for _ in self.engine.get_tensor_shape(name)))

    def execute_async_v3(self, stream: int) -> bool:
        """Puts a run on the stream: the shapes and the addresses are those of now."""
        machine, on = self._machine, self._machine.streams[stream]
        machine.calls["execute_async_v3"] += 1
        if missing := self.infer_shapes():
            return self._refuse(f"the shape of {missing[0]} is not set")
        if missing := [name for name in self.engine.names if name not in self._addresses]:
            return self._refuse(f"the address of {missing[0]} is not set")
        if self._chosen_on not in (None, stream):
            raise RuleError("The profile was chosen on another stream, and nobody waited for it.")
        self._check_places()
        shapes, addresses = dict(self._all_shapes), dict(self._addresses)
        able = self._ran_at == shapes and self.engine.file.capturable
        if on.captured is not None and not able:
            on.broken = True
            return self._refuse("operation not permitted when stream is capturing")
        if "execute_async_v3" in machine.fails:
            return self._refuse("Error Code 1: Cuda Runtime (out of memory)")
        generic, as_graph = self._kernels(shapes), self._graph((shapes, addresses))
        self._ran_at = shapes
        run = partial(self._run, shapes, addresses, as_graph=as_graph, generic=generic)
        idle = 0 if as_graph else self.engine.file.kernels - 1
        for kernel in [*[lambda: None] * idle, run]:
            machine.put(on, Work(kernel), host_us=machine.launch_us)
        return True

    def _kernels(self, shapes: Shapes) -> bool:
        """Whether they are those for every shape; compiles others."""
        if self.config is None:
            return False
        how = self.config.dynamic_shapes_kernel_specialization_strategy
        key = json.dumps(["shape", self.engine.sha256, sorted(shapes.items())])
        if how is Kernels.NONE:
            return True
        first = key not in self._specialised
        if first:
            if how is Kernels.EAGER:
                self.config.compile(key)
            self._specialised.add(key)
        return first and how is Kernels.LAZY

    def _graph(self, key: Any) -> bool:
        """Whether the library runs its own graph; the first run at new shapes captures one."""
        config = self.config
        if config is None or config.cuda_graph_strategy is CudaGraphStrategy.DISABLED:
            return False
        known, self._captured = self._captured == key, key
        if not known:
            self._machine.calls["captured by the library"] += 1
        return known

    def _check_places(self) -> None:
        """Each tensor lies in memory that was asked for; only aliased ones share it."""
        aliases, spans = self.engine.ends.aliases, []
        for name in self.engine.names:
            dtype, _ = self.engine.ends.tensors[name]
            size = max(1, byte_count(dtype, self.get_tensor_shape(name)))
            self._machine.on_device(self._addresses[name], size)
            if name in aliases:
                if self._addresses[name] != self._addresses[aliases[name]]:
                    raise RuleError(f"{name} does not lie where {aliases[name]} does.")
                continue
            spans.append((self._addresses[name], size, name))
        spans.sort()
        for (begin, size, name), (after, _, other) in pairwise(spans):
            if begin + size > after and not {name, other} <= set(self.engine.ends.inputs):
                raise RuleError(f"{name} and {other} overlap.")

    def _memory(self, address: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """What lies on the card, as an array; nothing lies anywhere."""
        size = byte_count(dtype, shape)
        raw = self._machine.on_device(address, size) if size else np.zeros(0, np.uint8)
        return raw.view(dtype).reshape(shape)

    def _feed(self, shapes: Shapes, addresses: dict[str, int]) -> dict[str, Any]:
        ends = self.engine.ends.inputs
        return {n: self._memory(addresses[n], d, shapes[n]).copy() for n, (d, _) in ends.items()}

    def _run(
        self, shapes: Shapes, addresses: dict[str, int], *, as_graph: bool, generic: bool
    ) -> float:
        engine, machine, feed = self.engine, self._machine, self._feed(shapes, addresses)
        read = sum(array.nbytes for name, array in feed.items() if name.startswith("past"))
        if engine.adapted.attention == "new":
            read = 0
            if (feed["attention_mask"].sum(axis=1) > feed["input_ids"].shape[1]).any():
                raise RuleError("A prefill that reads no past is run on caches that are filled.")
        as_graph |= machine.in_graph
        machine.runs.append(Run(self.active_optimization_profile, shapes, as_graph, generic))
        made = computed(engine.graph, engine.file.fault, feed)
        for name, array in made.items():
            dtype, _ = engine.ends.tensors[name]  # ONNX Runtime computes bfloat16 in float32
            self._memory(addresses[name], dtype, array.shape)[...] = array
        return (20 + (engine.file.weights_bytes + read) / 1e4) * (GENERIC if generic else 1.0)


def module_of(machine: Machine, library: str) -> SimpleNamespace:
    """``tensorrt`` or ``tensorrt_rtx``."""
    name, enums = library.replace("-", "_"), [Allocation, EngineStat]
    if library == "tensorrt-rtx":
        enums += [CudaGraphStrategy, EngineValidity, Diagnostics, Kernels]
    return SimpleNamespace(
        __name__=name, __spec__=ModuleSpec(name, None), __version__=VERSIONS[library],
        ILogger=ILogger, Runtime=partial(Runtime, machine), ICudaEngine=ICudaEngine,
        IExecutionContext=IExecutionContext,
        **{item.__name__: item for item in enums},
    )  # fmt: skip
