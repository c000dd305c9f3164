"""The one place where sessions of ONNX Runtime are made, and its words for what goes wrong.

Nothing is told to its makers: :func:`exporter.optional.require`, by which it is imported, turns its
telemetry off.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from exporter.engines.build.cuda_versions import ONNX_RUNTIME, refuse_old_driver
from exporter.engines.build.driver import ask_driver
from exporter.errors import BackendError
from exporter.optional import require

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
_LOAD_FAILURES = (
    (
        "incomplete-onnx",
        re.compile(r"Protobuf parsing failed|No graph was found|does not have a graph"),
        "{path} is not a complete ONNX file.",
        "It may be cut off: export or copy it again.",
    ),
    (
        "data-missing",
        re.compile(r"External data path does not exist"),
        "{path}: its external data is missing ({reason}).",
        "Copy the data file beside the ONNX file.",
    ),
    (
        "data-too-short",
        re.compile(r"GetExtDataFromTensorProto|External initializer"),
        "{path}: its external data is shorter than the graph says.",
        "The data file may be cut off: export or copy it again.",
    ),
    (
        "outside-folder",
        re.compile(r"External data path|escapes|outside"),
        "{path}: its external data can't be used ({reason}).",
        "The data must be a plain file in the model's folder.",
    ),
    (
        "newer-onnx",
        re.compile(r"released onnx opset|IR version|No Op registered"),
        "{path} needs more than onnxruntime {version} offers: {reason}",
        "Update onnxruntime, or export at an older opset.",
    ),
)

_NO_KERNEL = "Could not find an implementation for"


def check_provider(name: str) -> Any:
    """Gives the onnxruntime module, when it has a provider.

    Raises:
        BackendError: When the installed onnxruntime lacks it, or the driver is too old for it.
        MissingDependencyError: Without onnxruntime.
    """
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
        refuse_old_driver(ask_driver(), ONNX_RUNTIME, "gpu-cu12")
    return ort


def new_session(
    model: Path | bytes,
    *,
    providers: Sequence[str] = (CPU,),
    threads: int | None = None,
    optimise: bool = True,
    thrifty: bool = False,
    weights_folder: Path | None = None,
    weights: Mapping[str, Any] = _NO_WEIGHTS,
) -> Any:
    """Loads a model. Operators run one after the other.

    Args:
        model: The ONNX file, or a graph's bytes.
        providers: Execution providers by ONNX Runtime's names, the preferred one first. Where that
            isn't the CPU's, the session records who runs which node; see :func:`placement`.
        threads: Threads for one operator; None leaves it to ONNX Runtime.
        optimise: Whether ONNX Runtime may rewrite the graph.
        thrifty: Leaves weights in their file, mapped into memory, and runs the graph as it is
            written: slower, and no larger than a few weights.
        weights_folder: Where the external weights of a graph's bytes lie.
        weights: By name, ``OrtValue``s of weights that lie in no file.

    Raises:
        Exception: One of ONNX Runtime's own classes, which have no base of their own; see
            :func:`load_failure`.
        MissingDependencyError: Without onnxruntime.
    """
    ort = require("onnxruntime", extra="cpu")
    options = ort.SessionOptions()
    options.log_severity_level = _ONLY_FATAL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
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
        _load_cuda(ort)
    given = model if isinstance(model, bytes) else str(model)
    told = [_PROVIDER_OPTIONS.get(name, {}) for name in providers]
    return ort.InferenceSession(given, options, providers=list(providers), provider_options=told)


def _load_cuda(ort: Any) -> None:
    """Loads CUDA's and cuDNN's libraries from the packages that pip has put them in.

    ONNX Runtime alone looks where the system keeps libraries. What it can't load it prints.
    """
    with contextlib.redirect_stdout(sys.stderr):  # the command's own output may be JSON
        ort.preload_dlls()


def shape_nodes_on_cpu(session: Any, wanted: str, model: Path, version: str) -> dict[str, int]:
    """Counts the CPU's nodes by operator, and refuses those that compute more than shapes.

    Raises:
        BackendError: Such a node is there, nothing runs where it was asked to, or this version
            doesn't tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            f"onnxruntime {version} doesn't tell which nodes run on the CPU instead of {wanted}.",
            "Update onnxruntime-gpu to 1.25 or newer.",
            code="placement-unknown",
        )
    placed = placement(session)
    if not placed[wanted]:
        raise BackendError(
            f"{wanted} was asked for, but runs no node of {model}.", code="no-node-placed"
        )
    on_cpu = placed[CPU]
    computing = {name: count for name, count in on_cpu.items() if name not in _SHAPE_OPERATORS}
    if computing:
        told = ", ".join(f"{count} {name}" for name, count in sorted(computing.items()))
        raise BackendError(
            f"{wanted} was asked for, but these nodes of {model} would run on the CPU: {told}.",
            "There is no GPU kernel for their type or opset: export in another precision or at "
            "another opset; depthcut doesn't fall back.",
            code="nodes-on-cpu",
        )
    return dict(on_cpu)


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


def load_failure(path: Path, text: str, version: str) -> BackendError:
    """The error for a file that ONNX Runtime does not load."""
    reason = first_sentence(text)
    for code, pattern, message, hint in _LOAD_FAILURES:
        if pattern.search(text):
            told = message.format(path=path, reason=reason, version=version)
            return BackendError(told, hint, code=code)
    return BackendError(f"ONNX Runtime can't load {path}: {reason}", code="load-failed")


def first_sentence(text: str) -> str:
    """ONNX Runtime's message without its codes, source places and later lines."""
    text = text.strip().splitlines()[0] if text.strip() else "no reason given"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:\s*", "", text)
    text = re.sub(r"\S*/onnxruntime\S*:\d+ [^)]*\)(?: const)?\s*", "", text)
    text = re.sub(r"\w+\.cc:\d+ \w+ ", "", text)
    return text if len(text) <= 300 else text[:297] + "..."
