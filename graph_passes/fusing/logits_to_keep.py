"""Lets the caller choose of how many last positions a decoder gives logits.

The head of a language model makes 200 kB of logits for each token of a prompt, where its caller
wants those of the last one: for a prompt of 2048 tokens and 49152 words 400 MB, and a fifth of a
small model's work. Measures of accuracy want them all.

So the graph gets an input that need not be given, as transformers names it: ``num_logits_to_keep``,
int64 ``[1]``, the number of last positions whose logits are wanted, 0 for all. It is an initializer
that is an input as well, which ONNX takes for an input with a default, here 0: who doesn't know of
it gets all logits, as before.
"""

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
        head.replace_input_with(0, _last(graph, head, hidden))
        for node in path:
            _shorten(node.outputs[0])
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
        moving = [each for each in node.inputs if each is not None and not _is_constant(each)]
        if node.op_type not in _POSITIONWISE or len(moving) != 1:
            return []
        value = moving[0]
    return []


def _last(graph: ir.Graph, head: ir.Node, hidden: ir.Value) -> ir.Value:
    """``hidden[:, -keep:]``; a start of -0 is 0, so that 0 keeps all."""
    keep = _integers(graph, KEEP, 0)
    graph.inputs.append(keep)
    start = ir.node("Neg", [keep])
    end = _integers(graph, f"{KEEP}.end", np.iinfo(np.int64).max)
    axis = _integers(graph, f"{KEEP}.axis", _LENGTH)
    sliced = ir.node("Slice", [hidden, start.outputs[0], end, axis])
    graph.insert_before(head, [start, sliced])
    start.outputs[0].name, start.outputs[0].type = f"{KEEP}.start", keep.type
    start.outputs[0].shape = ir.Shape([1])
    last = sliced.outputs[0]
    last.name, last.type, last.shape = f"{hidden.name}.kept", hidden.type, hidden.shape
    _shorten(last)
    return last


def _integers(graph: ir.Graph, name: str, number: int) -> ir.Value:
    """An initializer int64 ``[1]``."""
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _shorten(value: ir.Value) -> None:
    """Gives its length a name of its own, since that is no longer the tokens'."""
    if value.shape is not None and len(value.shape) == _ACTIVATION_RANK:
        batch, _, width = value.shape
        value.shape = ir.Shape([batch, _KEPT, width])


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _is_constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(map(_is_constant, node.inputs))
