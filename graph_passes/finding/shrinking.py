"""Whether the stream keeps its size, told by its operators where no shape is declared."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.finding.dataflow import CONTRACTIONS, GraphIndex, factors

_TAKE_AWAY = frozenset(
    {"Slice", "Split", "SplitToSequence", "Compress", "TopK", "ArgMax", "ArgMin", "Unique"}
    | {"GatherElements", "GatherND", "Squeeze", "MaxPool", "AveragePool", "LpPool"}
)
_TAKE_AWAY_PREFIXES = ("Reduce", "Global")


def keeps_size(index: GraphIndex, above: ir.Value, value: ir.Value) -> bool:
    """Whether a path leads from one value to another on which nothing is taken away.

    Beside it, something may: a norm's mean is taken along an axis, but meets the whole again.
    """
    seen = {value}
    queue = [value]
    while queue:
        value = queue.pop()
        if value is above:
            return True
        node = value.producer()
        if node is not None and not _takes_away(index, node):
            operands = [v for v in index.data_reads(node) if v not in seen]
            seen.update(operands)
            queue.extend(operands)
    return False


def _takes_away(index: GraphIndex, node: ir.Node) -> bool:
    if node.op_type == "Gather":
        return node.inputs[0] in index.varying
    if node.op_type in CONTRACTIONS:
        weights = [value for value in factors(node) if value not in index.varying]
        return any(value.shape is not None and 1 in value.shape for value in weights[:1])
    return node.op_type in _TAKE_AWAY or node.op_type.startswith(_TAKE_AWAY_PREFIXES)
