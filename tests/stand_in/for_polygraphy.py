"""What Polygraphy's runner of engines asks of a machine besides what depthcut asks."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import polygraphy.backend.trt  # noqa: F401  # else each block of stand_in() would forget it again

from exporter.engines import verify
from exporter.engines.build import session
from exporter.engines.tensors import byte_count
from tests.stand_in import trt
from tests.stand_in.cuda import CudaRuntime
from tests.stand_in.machine import Machine

Mode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
Format = enum.Enum("TensorFormat", "LINEAR HWC CHW16")
Type = enum.Enum("DataType", "float32 float16 int32 int64 int8 uint8 bool")
_NAMES = {"float": "float32", "half": "float16"}


class Allocator:
    """``IOutputAllocator``: users write ``reallocate_output_async`` and ``notify_shape``."""

    def __init__(self) -> None: ...


class _Cudart:
    """CUDA's runtime as a C library; a pageable copy is done when its call returns."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._cuda = machine, CudaRuntime(machine)

    def cudaStreamCreate(self, stream: Any) -> int:
        code, stream._obj.value = self._cuda.cudaStreamCreateWithFlags(0)
        return int(code)

    def cudaStreamSynchronize(self, stream: Any) -> int:
        return int(self._cuda.cudaStreamSynchronize(stream.value)[0])

    def cudaStreamDestroy(self, stream: Any) -> int:
        return int(self._cuda.cudaStreamDestroy(stream.value)[0])

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        code, pointer._obj.value = self._cuda.cudaMalloc(size.value)
        return int(code)

    def cudaFree(self, pointer: Any) -> int:
        return int(self._cuda.cudaFree(pointer.value)[0]) if pointer.value else 0

    def cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: Any, stream: Any) -> int:
        self._machine.drain(self._machine.streams[stream.value])
        device = to if kind.value == 1 else source
        self._machine.on_device(device.value, size.value)  # or a rule is broken
        ctypes.memmove(to.value, source.value, size.value)
        return 0


def _ends(engine: Any) -> dict[str, Any]:
    return {**engine.ends.inputs, **engine.ends.outputs}


def _outputs(context: Any) -> dict[str, Any]:
    """What a run would give."""
    feed = {}
    for name, (dtype, _) in context.engine.ends.inputs.items():
        shape = context._all_shapes[name]
        size = byte_count(dtype, shape)
        place = context._machine.on_device(context._addresses[name], max(1, size))
        feed[name] = place[:size].view(dtype).reshape(shape).copy()
    results: dict[str, Any] = context.engine.graph.run(feed)
    return results


class _Engine:
    """Calls of ``ICudaEngine``."""

    @staticmethod
    def get_tensor_mode(engine: Any, name: str) -> Mode:
        return Mode.INPUT if name in engine.ends.inputs else Mode.OUTPUT

    @staticmethod
    def get_tensor_dtype(engine: Any, name: str) -> Type:
        result = _ends(engine)[name][0].name
        return Type[_NAMES.get(result, result)]

    @staticmethod
    def get_tensor_shape(engine: Any, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in _ends(engine)[name][1])

    @staticmethod
    def get_tensor_format(engine: Any, name: str, profile: int) -> Format:
        return Format.LINEAR

    @staticmethod
    def is_shape_inference_io(engine: Any, name: str) -> bool:
        return False


class _Context:
    """Calls of ``IExecutionContext``."""

    @staticmethod
    def get_tensor_address(context: Any, name: str) -> int:
        return int(context._addresses.get(name, 0))

    @staticmethod
    def set_output_allocator(context: Any, name: str, allocator: Any) -> bool:
        """TensorRT asks when it runs; here the inputs are told already."""
        shape = context.get_tensor_shape(name)
        if min(shape, default=0) < 0:  # an inner tensor's, which names don't tell
            shape = _outputs(context)[name].shape
        size = max(1, byte_count(_ends(context.engine)[name][0], shape))
        address = allocator.reallocate_output_async(name, 0, size, 256, 0)
        allocator.notify_shape(name, shape)
        return bool(context.set_tensor_address(name, address))


@contextlib.contextmanager
def polygraphy_on(machine: Machine, library: str = "tensorrt_rtx") -> Iterator[None]:
    """Has Polygraphy find the machine, within a block of :func:`stand_in`."""
    from polygraphy import config, cuda

    wrapper = object.__new__(cuda.Cuda)
    wrapper.handle = _Cudart(machine)
    for name, kind in {
        "ICudaEngine": trt.ICudaEngine, "IExecutionContext": trt.IExecutionContext,
        "TensorIOMode": Mode, "TensorFormat": Format, "IOutputAllocator": Allocator,
        **{item.name: item for item in Type},
    }.items():  # fmt: skip
        for module in ("tensorrt", "tensorrt_rtx"):  # it may have looked for either before
            setattr(sys.modules[module], name, kind)
    calls = [(trt.ICudaEngine, _Engine), (trt.IExecutionContext, _Context)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(config, "USE_TENSORRT_RTX", library[-3:] == "rtx"))
        stack.enter_context(mock.patch.object(cuda.cuda, "G_CUDA", wrapper))
        stack.enter_context(mock.patch.object(verify, "run_job", session.run_job))
        profile = property(lambda context: context.profile)
        more = [(trt.IExecutionContext, "active_optimization_profile", profile)]
        for kind, own in calls:
            more += [(kind, n, var.__func__) for n, var in vars(own).items() if n[0] != "_"]
        for kind, name, item in more:
            stack.enter_context(mock.patch.object(kind, name, item, create=True))
        yield
