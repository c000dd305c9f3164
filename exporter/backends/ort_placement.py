"""Which provider of ONNX Runtime runs which node, as a session's own record tells."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from exporter.errors import BackendError

_CPU = "CPUExecutionProvider"
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


def shape_nodes_on_cpu(session: Any, wanted: str, model: Path, version: str) -> dict[str, int]:
    """Counts the CPU's nodes by operator, and refuses those that compute more than shapes.

    Args:
        session: See :func:`placement`.
        wanted: The provider that was asked for.
        model: The file, for messages.
        version: Of ONNX Runtime.

    Raises:
        BackendError: Such a node is there, nothing runs where it was asked to, or this version
            doesn't tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            f"onnxruntime {version} doesn't tell which nodes run on the CPU instead of {wanted}.",
            "Update onnxruntime-gpu to 1.27 or newer.",
        )
    placed = placement(session)
    if not placed[wanted]:
        raise BackendError(f"{wanted} was asked for, but runs no node of {model}.")
    on_cpu = placed[_CPU]
    computing = {name: count for name, count in on_cpu.items() if name not in _SHAPE_OPERATORS}
    if computing:
        told = ", ".join(f"{count} {name}" for name, count in sorted(computing.items()))
        raise BackendError(
            f"{wanted} was asked for, but these nodes of {model} would run on the CPU: {told}.",
            "There is no GPU kernel for their type or opset: export in another precision or at "
            "another opset; depthcut doesn't fall back.",
        )
    return dict(on_cpu)


def placement(session: Any) -> dict[str, Counter[str]]:
    """Who runs what: provider to the number of its nodes by operator; none for a provider unnamed.

    Args:
        session: An ``InferenceSession`` that was made with :data:`RECORD_PLACEMENT` set to 1.
    """
    placed: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            outside = node.domain not in ("", "ai.onnx")
            name = f"{node.domain}.{node.op_type}" if outside else node.op_type
            placed[part.ep_name][name] += 1
    return placed
