"""Lets the caller choose of how many last positions a decoder gives logits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

KEEP = "num_logits_to_keep"
"""The input's name."""

_LOGITS = "logits"
_HEADS = frozenset({"MatMul", "MatMulNBits", "MatMulInteger"})
# What may stand between the head's product and the logits: it treats each position for itself.
_POSITIONWISE = frozenset({"Add", "Cast", "Div", "Identity", "Mul", "Tanh", "Where"})
_ACTIVATION_RANK, _LENGTH = 3, 1
_KEPT = "kept_logits"


class LogitsToKeepPass(ir.passes.InPlacePass):
    """Adds the input, where the head can be told; see the module.

    ``modified`` tells whether it could: a graph whose logits don't come from a product with a
    constant matrix, or which has such an input already, stays as it is.
    """

    def __init__(self, fixed: int | None = None) -> None:
        super().__init__()
        self.fixed = fixed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Finds the head, and lets it see the last positions alone."""
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == _LOGITS), None)
        taken = {value.name for value in graph.inputs} | set(graph.initializers)
        path = _head(logits) if logits is not None and KEEP not in taken else []
        if not path:
            return ir.passes.PassResult(model, modified=False)
        head = path[-1]
        hidden = head.inputs[0]
        assert hidden is not None
        head.replace_input_with(0, _last(graph, head, hidden, self.fixed))
        for node in path:
            _shorten(node.outputs[0], self.fixed)
        return ir.passes.PassResult(model, modified=True)


def _head(logits: ir.Value) -> list[ir.Node]:
    """The nodes from the logits back to the head's product; empty where that isn't plain."""
    path: list[ir.Node] = []
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        path.append(node)
        if value is not logits and (len(list(value.uses())) > 1 or value.is_graph_output()):
            return []
        if node.op_type in _HEADS:
            hidden = node.inputs[0]
            fits = hidden is not None and not _is_constant(hidden) and _rank(hidden) in (
                None, _ACTIVATION_RANK
            )  # fmt: skip
            return path if fits and all(map(_is_constant, node.inputs[1:])) else []
        moving = [item for item in node.inputs if item is not None and not _is_constant(item)]
        if node.op_type not in _POSITIONWISE or len(moving) != 1:
            return []
        value = moving[0]
    return []


def _last(graph: ir.Graph, head: ir.Node, hidden: ir.Value, fixed: int | None) -> ir.Value:
    """``hidden[:, -keep:]``; with a fixed number by places, so that its length is known."""
    if fixed is None:
        ends = [_integers(graph, "end", np.iinfo(np.int64).max), _integers(graph, "axis", _LENGTH)]
        kept = ir.node("Slice", [hidden, _chosen_start(graph, head), *ends])
    else:
        places = _integers(graph, "places", *range(-fixed, 0))
        kept = ir.node("Gather", [hidden, places], {"axis": _LENGTH})
    graph.insert_before(head, kept)
    last = kept.outputs[0]
    last.name, last.type, last.shape = f"{hidden.name}.kept", hidden.type, hidden.shape
    _shorten(last, fixed)
    return last


def _chosen_start(graph: ir.Graph, head: ir.Node) -> ir.Value:
    """The input's number from the end; a start of -0 is 0, so that 0 keeps all."""
    keep = _integers(graph, "", 0)
    graph.inputs.append(keep)
    negated = ir.node("Neg", [keep])
    graph.insert_before(head, negated)
    start = negated.outputs[0]
    start.name, start.type, start.shape = f"{KEEP}.start", keep.type, ir.Shape([1])
    return start


def _integers(graph: ir.Graph, use: str, *numbers: int) -> ir.Value:
    """An initializer int64, ``[count]``, named after its use; the choice itself has none."""
    name = f"{KEEP}.{use}" if use else KEEP
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _shorten(value: ir.Value, fixed: int | None) -> None:
    """Gives its length a number, or a name of its own, since that is no longer the tokens'."""
    if value.shape is not None and len(value.shape) == _ACTIVATION_RANK:
        batch, _, width = value.shape
        value.shape = ir.Shape([batch, _KEPT if fixed is None else fixed, width])


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(map(_is_constant, node.inputs))
