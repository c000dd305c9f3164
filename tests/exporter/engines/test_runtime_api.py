"""Whether what is called on a GPU exists at all: names and numbers of arguments, without a GPU."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from exporter.engines.build import cuda, session
from exporter.engines.build.libraries import ask_driver
from exporter.engines.build.logs import Listener
from exporter.errors import BackendError
from tests.raising import raises

pytestmark = pytest.mark.rtx
no_driver = pytest.mark.skipif(not ask_driver().problem, reason="there is an NVIDIA driver")


def api() -> dict[str, Any]:
    """By the names that the code gives them, the library's classes."""
    import tensorrt_rtx as trt

    return {
        "module": trt,
        "runtime": trt.Runtime,
        "engine": trt.ICudaEngine,
        "context": trt.IExecutionContext,
        "config": trt.IRuntimeConfig,
        "graphs": trt.CudaGraphStrategy,
        "kernels": trt.DynamicShapesKernelSpecializationStrategy,
        "ExecutionContextAllocationStrategy": trt.ExecutionContextAllocationStrategy,
    }


def asked(source: str, names: set[str]) -> set[tuple[str, str]]:
    """Every attribute that code asks of variables, or of attributes, with these names."""
    result = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = str(getattr(owner, "id", None) or getattr(owner, "attr", None)).strip("_")
            if name in names:
                result.add((name, node.attr))
    return result


def test_the_library_has_every_attribute_that_is_asked_of_it() -> None:
    known = api()
    wanted = asked(inspect.getsource(session), set(known))
    assert [pair for pair in wanted if not hasattr(known[pair[0]], pair[1])] == []
    assert ("context", "execute_async_v3") in wanted
    assert {owner for owner, _ in wanted} == set(known)
    known = {"config": known["config"], "cache": known["module"].IRuntimeCache}
    wanted = asked(inspect.getsource(session.RuntimeCache), set(known))
    assert [pair for pair in wanted if not hasattr(known[pair[0]], pair[1])] == []
    names = {"create_runtime_cache", "deserialize", "serialize"}
    assert {attribute for _, attribute in wanted} == names


def runtime() -> ModuleType:
    return pytest.importorskip("cuda.bindings.runtime")


def test_every_cuda_name_exists() -> None:
    module = runtime()
    wanted = set(re.findall(r"\bcuda[A-Z]\w+", inspect.getsource(cuda)))
    kinds = module.cudaMemcpyKind, module.cudaStreamCaptureMode, module.cudaDeviceAttr
    members = {*dir(module), *(name for kind in kinds for name in dir(kind))}
    assert {"cudaMalloc", "cudaMemcpyHostToDevice"} < wanted
    assert wanted - members - set(dir(module.cudaError_t)) == set()
    assert module.cudaStreamNonBlocking == cuda._NON_BLOCKING


def driverless() -> cuda.Cuda:
    """What has no stream, since none can be made here."""
    made = cuda.Cuda.__new__(cuda.Cuda)
    made._rt = runtime()
    made._kinds = made._rt.cudaMemcpyKind
    made._held, made._sizes = {}, {}
    made._stage = None
    made.stream = made._rt.cudaStream_t(0)
    return made


_ROW = np.zeros(4, np.uint8)
_CALLS: dict[str, Callable[[cuda.Cuda], object]] = {
    "free": lambda it: it.free_bytes(),
    "allocate": lambda it: it.allocate(16, "logits"),
    "pinned": lambda it: it.pinned(16),
    "send": lambda it: it.send(0, _ROW),
    "fetch": lambda it: it.fetch(_ROW, 0),
    "wait": lambda it: it.wait(),
    "event": lambda it: it.event(),
    "record": lambda it: it.record(it._rt.cudaEvent_t(0)),
    "elapsed": lambda it: it.elapsed_ms(it._rt.cudaEvent_t(0), it._rt.cudaEvent_t(0)),
    "captured": lambda it: it.captured(lambda: None),
}


@no_driver
@pytest.mark.parametrize("call", _CALLS)
def test_a_cuda_call_gets_as_far_as_the_missing_driver(call: str) -> None:
    """A wrong number or kind of arguments would be a TypeError before that."""
    with raises(BackendError, "run-failed", "insufficient", "(35)"):
        _CALLS[call](driverless())


@no_driver
def test_what_takes_a_handle_takes_one_argument_too() -> None:
    module = runtime()
    handles = {
        module.cudaFree: 0,
        module.cudaFreeHost: 0,
        module.cudaStreamDestroy: module.cudaStream_t(0),
        module.cudaEventDestroy: module.cudaEvent_t(0),
        module.cudaGraphDestroy: module.cudaGraph_t(0),
        module.cudaGraphExecDestroy: module.cudaGraphExec_t(0),
        module.cudaStreamEndCapture: module.cudaStream_t(0),
    }
    for call, handle in handles.items():
        assert int(call(handle)[0]) == 35
    assert int(module.cudaGraphInstantiate(module.cudaGraph_t(0), 0)[0]) == 35
    assert int(module.cudaGraphLaunch(module.cudaGraphExec_t(0), module.cudaStream_t(0))[0]) == 35


@no_driver
def test_cuda_without_a_driver_is_an_error_and_no_crash() -> None:
    runtime()
    with raises(BackendError, "run-failed", "stream"):
        cuda.Cuda("rtx")


def test_a_runtime_s_listener_keeps_errors_alone() -> None:
    import tensorrt_rtx as trt

    listener = Listener(trt, errors_only=True)
    listener.log.log(trt.ILogger.Severity.VERBOSE, "at every call")
    assert listener.last_error() == "it gives no reason"
    listener.log.log(trt.ILogger.Severity.ERROR, "[place.cpp::f::7] no room")
    assert listener.last_error() == "no room"
    assert listener.errors == ["no room"]
    assert listener.messages == []
