"""What this machine can do, and which extra brings what is missing."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Literal

from exporter.engines.build.libraries import (
    BINDINGS,
    LIBRARIES,
    ONNX_RUNTIME,
    Device,
    Driver,
    EngineLibrary,
    ask_driver,
    too_old,
    version_of,
)

Place = Literal["cpu", "gpu"]

_TIMEOUT_S = 60
_BROKEN = "it is installed, but does not load: install it again"
_PROVIDERS = """
import onnxruntime
from onnx import parser
from exporter.engines.runners.sessions import new_session
model = parser.parse_model('<ir_version: 10, opset_import: ["" : 20]> '
                           'g (float[2] x) => (float[2] y) { y = Add(x, x) }')
for provider in onnxruntime.get_available_providers():
    try:
        session = new_session(model.SerializeToString(), providers=[provider])
        loads = session.get_providers()[0] == provider
    except Exception:
        loads = False
    print(provider, int(loads))
"""


@dataclass(frozen=True)
class Component:
    """Something that depthcut can use."""

    name: str
    found: str
    serves: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All components that were looked at, and whether what was asked for can be done here."""

    components: tuple[Component, ...]
    fit: bool


_DISTRIBUTIONS = (
    ("torch", "torch", "scoring and export"),
    ("transformers", "torch", "loading models"),
    ("gguf", "gguf", "GGUF files"),
    ("optimum-onnx", "optimum", "exporter: optimum; ORTModel"),
    ("onnxruntime-genai", "genai", "decoders with fused attention: --target onnxruntime-cpu"),
    ("datasets", "datasets", "texts from the Hugging Face hub"),
    ("lm-eval", "eval", "tasks with right answers"),
    ("openvino", "openvino", "arms that OpenVINO runs: openvino:DIR"),
    ("llama-cpp-python", "llama-cpp", "arms that llama.cpp runs: llama.cpp:FILE"),
    ("ray", "cluster", "scores and searches on several machines"),
    ("cuda-bindings", "rtx", "running engines"),
    ("polygraphy", "rtx", "depthcut verify-engine -o"),
)
_ENGINES = {
    "tensorrt-rtx": "engines, built without a GPU too",
    "tensorrt": "engines, built on the card that runs them",
}


def diagnose() -> Diagnosis:
    """Looks at everything; nothing of CUDA is loaded before the driver was asked.

    Fit is a machine on which ONNX files can be pruned, verified and compared.
    """
    driver = ask_driver()
    runtime, providers = _runtime_components()
    components = [Component("Python", platform.python_version(), "everything"), runtime, *providers]
    components += [_distribution(name, extra, serves) for name, extra, serves in _DISTRIBUTIONS]
    components += [_engine_library(LIBRARIES[name], serves) for name, serves in _ENGINES.items()]
    result = [_with_driver(component, driver) for component in components]
    return Diagnosis((*result, *_driver_components(driver)), fit=bool(runtime.found))


def health(place: Place) -> Diagnosis:
    """Whether models can run on the CPU or on a GPU, for a health check that disturbs nothing.

    No session is made, and no memory is taken on a GPU: something may be measured meanwhile.
    """
    runtime = _installed_runtime()
    if runtime.found and _output_of("import onnxruntime") is None:  # which touches no device
        runtime = Component(runtime.name, "", runtime.serves, _BROKEN)
    if place == "cpu":
        return Diagnosis((runtime,), fit=not runtime.remedy)
    driver = ask_driver()
    engines = [_distribution(name, LIBRARIES[name].extra, _ENGINES[name]) for name in _ENGINES]
    components = [runtime, *(engine for engine in engines if engine.found)]
    components = [_with_driver(component, driver) for component in components]
    components += _driver_components(driver)[:1]
    return Diagnosis(tuple(components), fit=not any(component.remedy for component in components))


def _with_driver(component: Component, driver: Driver) -> Component:
    """The same, with what is wrong between it and the driver."""
    package = component.name
    known = package in (*LIBRARIES, BINDINGS, ONNX_RUNTIME)
    extra = LIBRARIES[package].extra_cuda12 if package in LIBRARIES else "gpu-cu12"
    problem, way_out = too_old(driver, package, extra)
    if not known or component.remedy or not problem:
        return component
    return replace(component, remedy=f"{problem}. {way_out}")


def _distribution(name: str, extra: str, serves: str) -> Component:
    version = version_of(name)
    missing = "" if version else f"pip install 'depthcut[{extra}]'"
    return Component(name, version or "", serves, missing)


def _engine_library(library: EngineLibrary, serves: str) -> Component:
    """One that is installed need not load: its libraries may be missing."""
    component = _distribution(library.backend, library.extra, serves)
    if not component.found or _output_of(f"import {library.module}") is not None:
        return component
    return Component(component.name, "", serves, _BROKEN)


def _runtime_components() -> tuple[Component, list[Component]]:
    """ONNX Runtime and its providers; one that is listed need not load, so each is tried."""
    runtime = _installed_runtime()
    if not runtime.found:
        return runtime, []
    output = _output_of(_PROVIDERS)
    if output is None:
        return Component(runtime.name, "", runtime.serves, _BROKEN), []
    rows = (line.split() for line in output.splitlines())
    loads = {row[0]: row[1] == "1" for row in rows if len(row) == len(("provider", "loads"))}
    return runtime, [
        Component(
            f"  {provider}", "loads" if ok else "", "running on it",
            "" if ok else "listed, but does not load: a library or the driver is missing",
        )
        for provider, ok in loads.items()
    ]  # fmt: skip


def _installed_runtime() -> Component:
    serves = "verifying and comparing ONNX files"
    versions = {name: version_of(name) for name in ("onnxruntime", ONNX_RUNTIME)}
    installed = {name: version for name, version in versions.items() if version}
    if not installed:
        return Component("onnxruntime", "", serves, "pip install 'depthcut[cpu]' (or [gpu])")
    remedy = "" if len(installed) == 1 else "both own one folder: uninstall both, install one"
    return Component(" and ".join(installed), ", ".join(installed.values()), serves, remedy)


def _output_of(program: str) -> str | None:
    """What a Python program prints; None where it fails. Its process may crash."""
    command = [sys.executable, "-P", "-c", program]
    try:
        return subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _driver_components(driver: Driver) -> list[Component]:
    serves = "running engines and CUDA"
    if driver.problem:
        remedy = f"{driver.problem}; engines for TensorRT-RTX are built all the same"
        return [Component("NVIDIA driver", "", serves, remedy)]
    cards = [_card(device, serves) for device in driver.devices]
    return [Component("NVIDIA driver", f"CUDA {driver.cuda_version}", serves), *cards]


def _card(device: Device, serves: str) -> Component:
    kind = device.compute_capability
    served = LIBRARIES["tensorrt-rtx"].supports(kind)
    remedy = "" if served else f"TensorRT-RTX does not support {kind}: --engine tensorrt does"
    return Component(f"  {device.name}", f"{kind}, {device.memory_bytes >> 30} GiB", serves, remedy)
