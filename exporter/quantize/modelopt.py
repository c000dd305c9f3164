"""fp8, int8 and int4-AWQ for TensorRT: NVIDIA's ModelOpt, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING

import numpy as np

from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import MissingDependencyError, QuantizationError
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from exporter.quantize.calibration import feed
from exporter.quantize.products import Products, Quantised
from exporter.quantize.settings import MODELOPT_HINT, Scheme
from graph_passes.files.storage import load_model, write_files

if TYPE_CHECKING:
    import onnx_ir as ir

_MODULE = "modelopt.onnx.quantization"
_VERSION = (
    "import importlib.metadata as m, importlib.util as u; u.find_spec('modelopt.onnx') or 1 / 0; "
    "print(m.version('nvidia-modelopt'))"
)
_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_SOURCE, _RESULT, _CALIBRATION = "float.onnx", "modelopt.onnx", "calibration.npz"
_IN_PLACE = "TensorScatter"


@dataclass(frozen=True)
class _Mode:
    """ModelOpt's names for a scheme, and the bits of its weights."""

    mode: str
    method: str
    bits: int


_MODES: Mapping[Scheme, _Mode] = {
    "fp8": _Mode("fp8", "max", 8),
    "int8-qdq": _Mode("int8", "max", 8),
    "int4-awq": _Mode("int4", "awq_clip", 4),
}


def modelopt_version(python: Path) -> str:
    """Which ModelOpt a Python has."""
    if not python.is_file():
        raise MissingDependencyError(
            f"There is no Python {python} to run ModelOpt with.",
            MODELOPT_HINT,
            code="python-missing",
        )
    done = _python(python, ["-c", _VERSION], None)
    lines = done.stdout.split()
    if done.returncode or not lines:
        raise MissingDependencyError(
            f"{python} has no ModelOpt for ONNX.", MODELOPT_HINT, code="modelopt-missing"
        )
    return lines[-1]


def method_of(scheme: Scheme, python: Path) -> str:
    """What a record calls ModelOpt's way to make a scheme, with its version."""
    return f"modelopt {modelopt_version(python)}, {_MODES[scheme].method}"


def refuse_caches_in_place(model: ir.Model, source: Path) -> None:
    """Refuses a graph that ModelOpt's ONNX Runtime can't calibrate."""
    if any(node.op_type == _IN_PLACE for node in model.graph):
        raise QuantizationError(
            f"{source} updates its caches in place, which ModelOpt's ONNX Runtime can't run.",
            "Export it with cache_length: 0 in a --config file.",
            code="caches-in-place",
        )


def quantise_with_modelopt(
    model: ir.Model,
    found: Products,
    stage: Path,
    scheme: Scheme,
    tokens: CalibrationText,
    python: Path,
    progress: Progress = QUIET,
) -> tuple[ir.Model, Quantised]:
    """Has ModelOpt quantise a graph that TensorRT is to build."""
    write_files(model, stage, _SOURCE, "compact")
    with OnnxRuntimeRunner(stage / _SOURCE, threads=1) as runner:  # only asked for its inputs
        # It takes one sample a call, and asks for all of them in one array.
        (every,) = tokens.batches(len(tokens.input_ids))
        calibration = feed(runner.inputs, every.trimmed())
    np.savez(stage / _CALIBRATION, **calibration)  # type: ignore[arg-type]
    with progress.task(f"ModelOpt, {scheme}"):
        _run(python, stage, _MODES[scheme], _precision(model), progress)
    result = load_model(stage / _RESULT)
    _put_back(result, model)
    bits = _MODES[scheme].bits
    done = Quantised.of_result(found, result, bits, lambda _: "ModelOpt left it out")
    if not done.bits[bits]:
        raise QuantizationError(
            f"ModelOpt found nothing to quantise into {scheme}.", code="nothing-to-quantize"
        )
    return result, done


def _put_back(result: ir.Model, model: ir.Model) -> None:
    """Gives a result the notes and the shapes that ModelOpt drops; later passes go by them."""
    result.metadata_props.update(model.metadata_props)
    known = {value.name: value for node in model.graph for value in node.outputs}
    for node in result.graph:
        for value in node.outputs:
            source = known.get(value.name)
            if source is not None and value.shape is None and source.shape is not None:
                value.shape, value.type = source.shape.copy(), value.type or source.type


def _run(python: Path, stage: Path, mode: _Mode, precision: str, progress: Progress) -> None:
    command = [
        "-m", _MODULE,
        "--onnx_path", _SOURCE, "--output_path", _RESULT,
        "--quantize_mode", mode.mode, "--calibration_method", mode.method,
        "--calibration_data_path", _CALIBRATION, "--calibration_eps", "cpu",
        "--high_precision_dtype", precision,
    ]  # fmt: skip
    done = _python(python, command, stage)
    said = f"{done.stdout}\n{done.stderr}".strip()
    progress.detail(said)
    if done.returncode or not (stage / _RESULT).is_file():
        last = said.splitlines()[-1] if said else f"exit code {done.returncode}"
        raise QuantizationError(
            f"ModelOpt fails on the graph: {last}",
            "-v shows all that it said.",
            code="modelopt-failed",
        )


def _python(python: Path, arguments: list[str], cwd: Path | None) -> CompletedProcess[str]:
    """Runs another environment's Python, without what this process imports from."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python.absolute()), *arguments]
    return subprocess.run(  # noqa: S603
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def _precision(model: ir.Model) -> str:
    """The float type of most weights, which products keep on their other side."""
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.name in _PRECISIONS:
            sizes[value.const_value.dtype.name] += value.const_value.size
    return _PRECISIONS[max(sizes, key=sizes.__getitem__, default="FLOAT")]
