"""Puts a machine in the place of the driver, of CUDA and of both libraries."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from exporter.engines.build import session, worker
from tests.stand_in.cuda import CudaRuntime
from tests.stand_in.machine import Machine
from tests.stand_in.trt import module_of


class DriverLibrary:
    """``libcuda`` of a machine: each call writes what it is asked for, and succeeds."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        major, minor = divmod(int(machine.capability.removeprefix("sm")), 10)
        self._capability = {75: major, 76: minor}

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = self._machine.name.encode()
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:
        content = bytes.fromhex(self._machine.uuid.removeprefix("GPU-").replace("-", ""))
        ctypes.memmove(uuid, content, 16)
        return 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        numbers: dict[str, Callable[..., int]] = {
            "cuDriverGetVersion": lambda: self._machine.driver,
            "cuDeviceGetCount": lambda: 1,
            "cuDeviceGet": lambda number: number,
            "cuDeviceTotalMem_v2": lambda device: self._machine.memory_bytes,
            "cuDeviceGetAttribute": lambda which, device: self._capability[which],
        }

        def write(where: Any, *arguments: Any) -> int:
            where._obj.value = numbers[name](*arguments)
            return 0

        return write


@contextlib.contextmanager
def stand_in(**facts: Any) -> Iterator[Machine]:
    """A machine that all of depthcut takes for the card that is there."""
    machine, real = Machine(**facts), ctypes.CDLL

    def library(name: Any, *rest: Any, **more: Any) -> Any:
        return DriverLibrary(machine) if name == "libcuda.so.1" else real(name, *rest, **more)

    def job(library: Any, request: dict[str, Any], *_: Any) -> dict[str, Any]:
        machine.calls["processes"] += 1
        content = json.loads(json.dumps({"backend": library.backend, **request}))
        return worker._JOBS[request["job"]](content)

    modules = {
        "cuda.bindings.runtime": CudaRuntime(machine),
        "tensorrt": module_of(machine, "tensorrt"),
        "tensorrt_rtx": module_of(machine, "tensorrt-rtx"),
    }
    with (
        tempfile.TemporaryDirectory() as home,
        mock.patch.dict(os.environ, {"XDG_CACHE_HOME": home}),
        mock.patch.dict(sys.modules, modules),  # type: ignore[arg-type]
        mock.patch.object(ctypes, "CDLL", library),
        mock.patch.object(session, "run_job", job),
    ):
        yield machine
