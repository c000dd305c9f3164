"""The one place where sessions of ONNX Runtime are made, and its words for what goes wrong."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes  # noqa: F401  # numpy knows bfloat16 from its import on
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.engines.build.libraries import ONNX_RUNTIME, ask_driver, refuse_old_driver
from exporter.errors import BackendError
from exporter.files import scratch_folder
from exporter.optional import require
from graph_passes.files.storage import load_model, save_model
from graph_passes.replacements import array_of

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Short names of the execution providers that depthcut knows."""

CPU = PROVIDERS["cpu"]
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""The session option without which :func:`placement` finds nothing; ONNX Runtime 1.24 and newer.

Before 1.27 it left out float16 nodes without a kernel, which are given to the CPU late.
"""

# What computes shapes, positions and masks. ONNX Runtime keeps such nodes on the CPU when their
# inputs are there. The record tells no types, so one of these that works on activations passes too;
# the report counts them all, and a graph whose real work has left the GPU has others besides.
_SHAPE_OPERATORS = frozenset(
    name
    for line in (
        "Shape Size Constant ConstantOfShape Range Identity Cast If",
        "Concat Expand Flatten Reshape Slice Split Squeeze Tile Trilu Unsqueeze",
        "Gather GatherElements GatherND NonZero ScatterElements ScatterND Where",
        "Abs Add Ceil CumSum Div Floor Max Min Mod Mul Neg Sign Sub",
        "And Equal Greater GreaterOrEqual Less LessOrEqual Not Or Xor",
        "ReduceMax ReduceMin ReduceProd ReduceSum",
    )
    for name in line.split()
)

_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
# Engines are built without TF32 unless they are told otherwise: fp32 means the same on both sides.
_PROVIDER_OPTIONS = {PROVIDERS["cuda"]: {"use_tf32": "0"}}
_ONLY_FATAL = 4  # the log severity that leaves errors to the exceptions
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_NO_WEIGHTS: Mapping[str, Any] = MappingProxyType({})
_NO_KERNEL = "Could not find an implementation for"


def check_provider(name: str) -> Any:
    """Gives the onnxruntime module, when it has a provider."""
    ort = require("onnxruntime", extra=_EXTRAS[name])
    present = ort.get_available_providers()
    if PROVIDERS[name] not in present:
        raise BackendError(
            f"{PROVIDERS[name]} was asked for; this onnxruntime has {', '.join(present)}.",
            "pip uninstall onnxruntime, then pip install 'depthcut[gpu]': "
            "the two packages can't live together.",
            code="provider-missing",
        )
    if name == "cuda":
        refuse_old_driver(ask_driver(), "gpu-cu12", ONNX_RUNTIME)
    return ort


def new_session(
    model: Path | bytes,  # the ONNX file, or a graph's bytes
    *,
    providers: Sequence[str] = (CPU,),
    threads: int | None = None,  # threads for one operator; None leaves it to ONNX Runtime
    optimise: bool = True,
    thrifty: bool = False,
    weights_folder: Path | None = None,  # where the external weights of a graph's bytes lie
    weights: Mapping[str, Any] = _NO_WEIGHTS,
) -> Any:
    """Loads a model. Operators run one after the other."""
    ort = require("onnxruntime", extra="cpu")
    options = ort.SessionOptions()
    options.log_severity_level = _ONLY_FATAL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    # Else threads wait at work for up to 50 ms after a run, on cores that another arm runs on next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if providers[0] != CPU:
        options.add_session_config_entry(RECORD_PLACEMENT, "1")
    if weights_folder is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights_folder.resolve()))
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    if thrifty or not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if thrifty:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # it gives nothing back
        options.enable_mem_pattern = False
        # Widens each half-precision weight just before it is needed, not all at the start.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if PROVIDERS["cuda"] in providers:
        # From pip's packages; it alone looks where the system keeps libraries. What it can't load
        # it prints, and the command's own output may be JSON.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    given = model if isinstance(model, bytes) else str(model)
    values = [_PROVIDER_OPTIONS.get(name, {}) for name in providers]
    return ort.InferenceSession(given, options, providers=list(providers), provider_options=values)


def refuse_nodes_on_cpu(session: Any, wanted: str, model: Path, version: str) -> None:
    """Refuses nodes that compute more than shapes on the CPU."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            f"onnxruntime {version} doesn't tell which nodes run on the CPU instead of {wanted}.",
            "Update onnxruntime-gpu to 1.25 or newer.",
            code="provider-missing",
        )
    placed = placement(session)
    if not placed[wanted]:
        raise BackendError(
            f"{wanted} was asked for, but runs no node of {model}.", code="nodes-on-cpu"
        )
    computing = {name: count for name, count in placed[CPU].items() if name not in _SHAPE_OPERATORS}
    if computing:
        text = ", ".join(f"{count} {name}" for name, count in sorted(computing.items()))
        raise BackendError(
            f"{wanted} was asked for, but these nodes of {model} would run on the CPU: {text}.",
            "There is no GPU kernel for their type or opset: export in another precision or at "
            "another opset; depthcut doesn't fall back.",
            code="nodes-on-cpu",
        )


def placement(session: Any) -> dict[str, Counter[str]]:
    """By provider, how many nodes of each operator it runs, as a session recorded it."""
    placed: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            outside = node.domain not in ("", "ai.onnx")
            name = f"{node.domain}.{node.op_type}" if outside else node.op_type
            placed[part.ep_name][name] += 1
    return placed


def lacks_a_kernel(text: str) -> bool:
    """Whether that is why ONNX Runtime does not load a file."""
    return _NO_KERNEL in text


def load_failure(path: Path, error: Exception, version: str) -> BackendError:
    """The error for a file that ONNX Runtime does not load; what is damaged tells so itself."""
    load_model(path)
    return BackendError(
        f"ONNX Runtime {version} can't load {path}: {first_sentence(str(error))}",
        "Update onnxruntime, or export at an older opset or for another target.",
        code="load-failed",
    )


def first_sentence(text: str) -> str:
    """ONNX Runtime's message without its codes, source places and later lines."""
    text = text.strip().splitlines()[0] if text.strip() else "no reason given"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:\s*", "", text)
    text = re.sub(r"\S*/onnxruntime\S*:\d+ [^)]*\)(?: const)?\s*", "", text)
    text = re.sub(r"\w+\.cc:\d+ \w+ ", "", text)
    return text if len(text) <= 300 else text[:297] + "..."


Arrays = Mapping[str, NDArray[Any]]

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "softmax_precision"})


def has_bfloat16(model: ir.Model) -> bool:
    """Whether a value, a weight or a constant of a graph is bfloat16; no weight is read."""
    narrow = ir.DataType.BFLOAT16
    if any(value.dtype == narrow for value in _values(model)):
        return True
    return any(
        attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow
        for node in model.graph.all_nodes()
        for attribute in node.attributes.values()
    )


def in_float32(model: ir.Model, narrow: ir.DataType = ir.DataType.BFLOAT16) -> ir.Model:
    """The same graph with float32 in the place of a type.

    What a cut leaves out or joins wrongly shows just as well; the graph's own rounding does not.
    """
    copy = model.clone()
    for node in copy.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor(), narrow))
            elif name in _TYPE_ATTRIBUTES and attribute.value == narrow:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
    for value in _values(copy):
        if value.dtype == narrow:
            value.type = ir.TensorType(ir.DataType.FLOAT)  # the two models share the old one
        if value.const_value is not None:
            value.const_value = _widened(value.const_value, narrow)
    return copy


def widened_arrays(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Arrays for such a copy."""
    return {
        name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array
        for name, array in arrays.items()
    }


def narrowed_arrays(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """What such a copy gives, as far as bfloat16 would tell it."""
    return {
        name: array.astype(np.dtype("bfloat16")) if array.dtype == np.float32 else array
        for name, array in arrays.items()
    }


def loaded(graph: bytes, weights_folder: Path) -> ir.Model:
    """A serialised model of which the data files lie in a folder."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(graph))
    ir.external_data.set_base_dir(model.graph, weights_folder)
    return model


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _widened(tensor: ir.TensorProtocol, narrow: ir.DataType) -> ir.TensorProtocol:
    if tensor.dtype != narrow:
        return tensor
    shape = ir.Shape(tensor.shape.numpy())
    read = partial(_read, tensor)
    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=tensor.name)


def _read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(array_of(tensor).astype(np.float32), name=tensor.name)


class WidenedCopy:
    """A copy in a folder of its own, which goes when nobody holds the copy any more."""

    def __init__(self, model: Path, *, beside: bool = False) -> None:
        leave = contextlib.ExitStack()
        self._gone = weakref.finalize(self, leave.close)
        self.file = leave.enter_context(_folder(model if beside else None)) / "model.onnx"
        save_model(in_float32(load_model(model)), self.file)

    def __enter__(self) -> Path:
        """The copy's path."""
        return self.file

    def __exit__(self, *exc_info: object) -> None:
        """Removes the copy."""
        self._gone()


@contextlib.contextmanager
def _folder(beside: Path | None) -> Iterator[Path]:
    if beside is None:
        with scratch_folder("float32") as folder:
            yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix=".depthcut.", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_bfloat16(model: Path) -> bool:
    """Whether anything in an ONNX file is bfloat16."""
    return has_bfloat16(load_model(model))
