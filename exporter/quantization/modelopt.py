"""fp8, int8 and int4-AWQ for TensorRT: NVIDIA's ModelOpt, in an environment of its own.

ModelOpt wants another onnx and ONNX Runtime than ours (``nvidia-modelopt[onnx]`` 0.47: onnx 1.21,
onnxruntime-gpu 1.24), so its Python is named and run as a process of its own. It calibrates on the
CPU. It rewrites the file that it is given, so it is given a copy, and drops a graph's notes, which
are put back. Its ONNX Runtime has no TensorScatter: quantise a graph whose caches grow
(``export --target tensorrt-rtx --cache-length 0``), after the cut. Of ``int4-awq``
:func:`exporter.forms.tensorrt.rewrite_decoder` then puts them in place; fp8 and int8 have quantised
values before Attention, too, and keep caches that grow.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts.forms import QUANTIZATION_KEY, QuantizationRecord
from exporter.errors import MissingDependencyError, QuantizationError
from exporter.files import refuse_overwriting
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    import onnx_ir as ir

ModelOptScheme = Literal["fp8", "int8-qdq", "int4-awq"]

_MODULE = "modelopt.onnx.quantization"
_PRECISIONS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
_SOURCE, _RESULT, _CALIBRATION = "float.onnx", "quantised.onnx", "calibration.npz"


@dataclass(frozen=True)
class _Mode:
    """ModelOpt's names for a scheme, and the bits of its weights."""

    mode: str
    method: str
    bits: int


_MODES: Mapping[ModelOptScheme, _Mode] = {
    "fp8": _Mode("fp8", "max", 8),
    "int8-qdq": _Mode("int8", "max", 8),
    "int4-awq": _Mode("int4", "awq_clip", 4),
}


def quantize_with_modelopt(
    source: Path,
    output: Path,
    scheme: ModelOptScheme,
    calibration: Mapping[str, NDArray[Any]],
    *,
    python: Path,
    source_of_text: str | None = None,
    progress: Progress = QUIET,
) -> QuantizationRecord:
    """Has ModelOpt quantise a graph that TensorRT is to build.

    Args:
        source: The float ONNX file; it is not changed.
        output: The file to write; it appears with its weights, or not at all.
        scheme: Into what.
        calibration: By input, the samples ``[samples, ...]`` of all its calls.
        python: The Python of the environment that ModelOpt is installed in.
        source_of_text: What the record calls the calibration text.
        progress: Sees what ModelOpt says, as details.

    Returns:
        The record that the graph carries.

    Raises:
        MissingDependencyError: That Python is not there, or has no ModelOpt.
        QuantizationError: ModelOpt fails, or quantises nothing.
        OnnxFileError: The source can't be read, or the output not written.
        UsageError: The output is the source.
    """
    from graph_passes.files import storage
    from graph_passes.files.placing import place, staging

    model = storage.load_model(source)
    refuse_overwriting(output, [source, *storage.data_files(model)])
    _refuse_missing(python)
    try:
        with staging(output) as stage:
            storage.write_files(model, stage, _SOURCE, "compact")
            np.savez(stage / _CALIBRATION, **dict(calibration))  # type: ignore[arg-type]
            with progress.task(f"ModelOpt, {scheme}"):
                _run(python, stage, _MODES[scheme], _precision(model), progress)
            result = storage.load_model(stage / _RESULT)
            record = _record(result, scheme, source_of_text)
            _put_back(result, model)
            result.metadata_props[QUANTIZATION_KEY] = record.model_dump_json(exclude_none=True)
            written = storage.write_files(result, stage, output.name, "compact")
            place([(file, output.parent / file.name) for file in written], [])
    except OSError as error:
        raise storage.write_error(output, error) from error
    return record


def _put_back(result: ir.Model, model: ir.Model) -> None:
    """Gives a result the notes and the shapes that ModelOpt drops; later passes go by them."""
    result.metadata_props.update(model.metadata_props)
    known = {value.name: value for node in model.graph for value in node.outputs}
    for node in result.graph:
        for value in node.outputs:
            source = known.get(value.name)
            if source is not None and value.shape is None and source.shape is not None:
                value.shape, value.type = source.shape.copy(), value.type or source.type


def _refuse_missing(python: Path) -> None:
    hint = "Make an environment for it: pip install 'nvidia-modelopt[onnx]', and name its Python."
    if not python.is_file():
        raise MissingDependencyError(f"There is no Python {python} to run ModelOpt with.", hint)
    asked = [str(python), "-c", "import importlib.util as u; u.find_spec('modelopt.onnx') or 1 / 0"]
    if subprocess.run(asked, capture_output=True, check=False).returncode:  # noqa: S603
        raise MissingDependencyError(f"{python} has no ModelOpt.", hint)


def _run(python: Path, stage: Path, mode: _Mode, precision: str, progress: Progress) -> None:
    command = [
        str(python), "-m", _MODULE,
        "--onnx_path", _SOURCE, "--output_path", _RESULT,
        "--quantize_mode", mode.mode, "--calibration_method", mode.method,
        "--calibration_data_path", _CALIBRATION, "--calibration_eps", "cpu",
        "--high_precision_dtype", precision,
    ]  # fmt: skip
    # Not what this process imports from: the other environment has its own.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(  # noqa: S603
        command, cwd=stage, env=env, capture_output=True, text=True, check=False
    )
    said = f"{done.stdout}\n{done.stderr}".strip()
    progress.detail(said)
    if done.returncode or not (stage / _RESULT).is_file():
        last = said.splitlines()[-1] if said else f"exit code {done.returncode}"
        raise QuantizationError(
            f"ModelOpt fails on the graph: {last}",
            "-v shows all that it said. Its ONNX Runtime takes no caches in place: export with "
            "--cache-length 0.",
        )


def _precision(model: ir.Model) -> str:
    """The float type of most weights, which products keep on their other side."""
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.name in _PRECISIONS:
            sizes[value.const_value.dtype.name] += value.const_value.size
    return _PRECISIONS[max(sizes, key=sizes.__getitem__, default="FLOAT")]


def _record(model: ir.Model, scheme: ModelOptScheme, text: str | None) -> QuantizationRecord:
    products = sum(map(_is_quantised, model.graph))
    if not products:
        raise QuantizationError(f"ModelOpt found nothing to quantise into {scheme}.", "")
    mode = _MODES[scheme]
    return QuantizationRecord(
        scheme=scheme,
        method=f"modelopt {mode.method}",
        bits={str(mode.bits): products},
        calibration=text,
    )


def _is_quantised(node: ir.Node) -> bool:
    """Whether a node multiplies by a weight that is read from fewer bits."""
    if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
        return False
    weight = node.inputs[1]
    maker = weight.producer() if weight is not None else None
    while maker is not None and maker.op_type in ("Transpose", "Cast", "Reshape"):
        above = maker.inputs[0]
        maker = above.producer() if above is not None else None
    return maker is not None and "DequantizeLinear" in maker.op_type
