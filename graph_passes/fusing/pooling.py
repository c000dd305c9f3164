"""Adds what makes one vector of a text's token states: the pooling of a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graph_passes.errors import SurgeryError
from graph_passes.fusing.masks import MASK
from graph_passes.fusing.new_nodes import NewNodes

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
"""The first token, the largest value of each channel, the mean, the sum over the root of the number
of tokens, the mean weighted by position, the last token; of a text's tokens without padding."""
MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
STATES, EMBEDDING = "last_hidden_state", "sentence_embedding"

Activation = Literal["Identity", "Tanh", "Relu", "Sigmoid"]
"""What follows a product, as ONNX calls it."""

_TOKENS = 1  # the axis
_AXES_AS_INPUT = 18  # the opset from which every reduction takes them so
_SHORTEST = 1e-12  # what a length is at least, before it is divided by


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A product that the vector goes through: sentence-transformers' module Dense."""

    weight: NDArray[np.float32]  # `[out, in]`, float32
    bias: NDArray[np.float32] | None  # `[out]`, float32; None without
    activation: Activation


class SentencePoolingPass(ir.passes.InPlacePass):
    """Adds the output; see the module."""

    def __init__(
        self,
        modes: Sequence[PoolingMode],  # one at least
        *,
        normalised: bool,
        dense: Sequence[DenseLayer] = (),
    ) -> None:
        super().__init__()
        self.dense = tuple(dense)
        self.modes = tuple(modes)
        self.normalised = normalised

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Appends the nodes."""
        graph = model.graph
        states = _named(graph.outputs, STATES)
        mask = _named(graph.inputs, MASK)
        if states is None or mask is None or _named(graph.outputs, EMBEDDING) is not None:
            raise SurgeryError(
                f"Pooling needs an output {STATES}, an input {MASK} and no {EMBEDDING} yet.",
                "Pool a graph of a sentence encoder that is not pooled.",
                code="takes-no-tokens",
            )
        pooled = _Pooling(graph, states, mask, graph.opset_imports.get("", 0))
        value = pooled.vector(self.modes)
        for layer in self.dense:
            value = pooled.through(layer, value)
        pooled.append(pooled.normalised(value) if self.normalised else value)
        return ir.passes.PassResult(model, modified=True)


class _Pooling:
    """The nodes, while they are made.

    states: `[batch, tokens, hidden]`.
    mask: int64 `[batch, tokens]`.
    """

    def __init__(self, graph: ir.Graph, states: ir.Value, mask: ir.Value, opset: int) -> None:
        self._graph = graph
        self._opset = opset
        self._new = NewNodes(graph, "pooling")
        self._width = None if states.shape is None else states.shape[-1]
        self._states = self._float(states) if states.dtype != ir.DataType.FLOAT else states
        self._mask = self._float(mask)
        self._batch = None if mask.shape is None else mask.shape[0]
        self._size: int | None = None

    def vector(self, modes: Sequence[PoolingMode]) -> ir.Value:
        """``[batch, size]``."""
        if isinstance(self._width, int):
            self._size = self._width * len(modes)
        values = [self._largest() if mode == "max" else self._weighted(mode) for mode in modes]
        return values[0] if len(values) == 1 else self._new.op("Concat", *values, axis=-1)

    def through(self, layer: DenseLayer, vector: ir.Value) -> ir.Value:
        """A product and what follows it, ``[batch, out]``."""
        size, wanted = self._size, layer.weight.shape[1]
        if size not in (None, wanted):
            raise SurgeryError(
                f"A product behind the pooling takes vectors of {wanted} numbers, not {size}.",
                "Pool a graph of the model that the product was trained with.",
                code="takes-no-tokens",
            )
        value = self._new.op("MatMul", vector, self._new.floats(layer.weight.T))
        if layer.bias is not None:
            value = self._new.op("Add", value, self._new.floats(layer.bias))
        self._size = len(layer.weight)
        return self._new.op(layer.activation, value)

    def normalised(self, vector: ir.Value) -> ir.Value:
        """The same of length 1."""
        squares = self._new.op("Mul", vector, vector)
        length = self._new.op("Sqrt", self._sum(squares))
        return self._new.op("Div", vector, self._new.op("Max", length, self._number(_SHORTEST)))

    def append(self, vector: ir.Value) -> None:
        """Puts all nodes at the graph's end, and makes the vector an output."""
        self._new.append()
        vector.name = EMBEDDING
        vector.dtype = ir.DataType.FLOAT
        vector.shape = ir.Shape([self._batch, self._size])
        self._graph.outputs.append(vector)

    def _weighted(self, mode: PoolingMode) -> ir.Value:
        """A sum of states, ``[batch, hidden]``."""
        weights, divisor = self._weights(mode)
        flat = self._new.op("Unsqueeze", weights, self._new.integers([_TOKENS]))
        row = self._new.op("MatMul", flat, self._states)
        value = self._new.op("Squeeze", row, self._new.integers([_TOKENS]))
        return value if divisor is None else self._new.op("Div", value, divisor)

    def _weights(self, mode: PoolingMode) -> tuple[ir.Value, ir.Value | None]:
        """Of each token in a sum, ``[batch, tokens]``, 0 at padding; and the sum's divisor."""
        total = self._sum(self._mask)
        if mode == "mean":
            return self._mask, total
        if mode == "mean_sqrt_len_tokens":
            return self._mask, self._new.op("Sqrt", total)
        order = self._new.op("CumSum", self._mask, self._new.integers(_TOKENS))
        if mode == "weightedmean":
            rising = self._new.op("Mul", order, self._mask)
            return rising, self._sum(rising)
        place = self._number(1.0) if mode == "cls" else total
        chosen = self._float(self._new.op("Equal", order, place))
        return self._new.op("Mul", chosen, self._mask), None

    def _largest(self) -> ir.Value:
        padding = self._new.op("Equal", self._mask, self._number(0.0))
        spread = self._new.op("Unsqueeze", padding, self._new.integers([-1]))
        lowest = self._number(float("-inf"))
        kept = self._new.op("Where", spread, lowest, self._states)
        if self._opset < _AXES_AS_INPUT:
            return self._new.op("ReduceMax", kept, axes=[_TOKENS], keepdims=0)
        return self._new.op("ReduceMax", kept, self._new.integers([_TOKENS]), keepdims=0)

    def _sum(self, value: ir.Value) -> ir.Value:
        """Over the last axis, which stays with length 1."""
        return self._new.op("ReduceSum", value, self._new.integers([-1]), keepdims=1)

    def _float(self, value: ir.Value) -> ir.Value:
        return self._new.op("Cast", value, to=int(ir.DataType.FLOAT))

    def _number(self, number: float) -> ir.Value:
        return self._new.op("Constant", value=ir.tensor(number, dtype=ir.DataType.FLOAT))


def _named(values: Sequence[ir.Value], name: str) -> ir.Value | None:
    return next((value for value in values if value.name == name), None)
