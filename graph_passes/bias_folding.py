"""Adds a bias that stands on the stream to one that is there already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.cleanup import drop_unused_weight
from graph_passes.finding.dataflow import is_add
from graph_passes.fused_norms import Apart
from graph_passes.locate import FoundSite
from graph_passes.replacement_nodes import PutIn
from graph_passes.replacements import array_of
from graph_passes.types import SublayerRef

_BIAS_OPERANDS = {"Gemm": 2, "LayerNormalization": 2}
_PASS_ON = frozenset({"Identity", "Reshape"})
"""What keeps the last axis, given that a bias of its width is added before it."""


@dataclass(frozen=True)
class _Home:
    """A node and its operand that is a bias, or, in a free home, the one to add a bias to."""

    node: ir.Node
    slot: int
    is_free: bool = False


class BiasFolder:
    """Folds the biases of replacements, once the branches are gone."""

    def __init__(
        self, graph: ir.Graph, parts: Iterable[Apart], survivors: Sequence[FoundSite]
    ) -> None:
        self._graph = graph
        self._fused = {part.total for part in parts if part.total is not part.original}
        self._embeddings = {part.norm for part in parts if part.total is part.original}
        self._survivors = survivors
        self.made: set[ir.Node] = set()
        self.replaced: set[ir.Value] = set()
        self._biases: set[ir.Value | None] = set()

    def fold(self, put: Iterable[PutIn]) -> dict[SublayerRef, tuple[SublayerRef, ...]]:
        """Folds each bias that stands on the stream, where it has a home."""
        put = list(put)
        self._biases = {put_in.bias.inputs[1] for put_in in put}
        owners = {put_in.ref: self._fold(put_in.bias) for put_in in put if put_in.on_stream}
        return {ref: owner for ref, owner in owners.items() if owner}

    def _fold(self, add: ir.Node) -> tuple[SublayerRef, ...]:
        stream, bias = add.inputs
        assert stream is not None
        assert bias is not None
        home = self._home(stream, bias)
        if home is None:
            return ()
        self._bypass(add, stream)
        if home.is_free:
            self._add_before(home, bias, add.name)
        else:
            self._merge(home, bias)
        return tuple(
            site.ref
            for site in self._survivors
            if home.node in site.dying or home.node is site.tree.add
        )

    def _home(self, value: ir.Value, bias: ir.Value) -> _Home | None:
        """What may take a bias instead of those who read ``value``, of whom there is one only."""
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        slot = self._bias_slot(node, bias)
        if slot is not None:
            return _Home(node, slot)
        if is_add(node):
            return self._home_in_sum(node, bias)
        if node.op_type in _PASS_ON and node.inputs[0] is not None:
            return self._home(node.inputs[0], bias)
        return None

    def _home_in_sum(self, total: ir.Node, bias: ir.Value) -> _Home | None:
        homes = (self._home(value, bias) for value in total.inputs if value is not None)
        home = next((home for home in homes if home is not None), None)
        if home is None and total in self._fused:
            return _Home(total, self._branch_slot(total), is_free=True)
        return home

    def _branch_slot(self, total: ir.Node) -> int:
        """The operand of a fused sum that its bias is to go to: where one can tell, the branch."""
        ends = {leaf.value for site in self._survivors for leaf in site.leaves}
        return 0 if total.inputs[0] in ends else 1

    def _bias_slot(self, node: ir.Node, bias: ir.Value) -> int | None:
        """The operand of a node that is a constant like the bias, added to what it makes."""
        if node.domain != "":
            return None
        if node.op_type == "Add":
            return next((i for i, v in enumerate(node.inputs) if self._is_alike(v, bias)), None)
        slot = _BIAS_OPERANDS.get(node.op_type)
        if slot is None or slot >= len(node.inputs) or node in self._embeddings:
            return None
        whole = node.attributes.get_float("beta", 1.0) == 1.0
        return slot if whole and self._is_alike(node.inputs[slot], bias) else None

    def _is_alike(self, value: ir.Value | None, bias: ir.Value) -> bool:
        return (
            value is not None
            and self._graph.initializers.get(value.name or "") is value
            and not value.is_graph_input()
            and value.const_value is not None
            and value.const_value.dtype == bias.dtype
            and value.const_value.shape == bias.shape
        )

    def _bypass(self, add: ir.Node, stream: ir.Value) -> None:
        """Takes the Add off the stream."""
        result = add.outputs[0]
        if result.is_graph_output():
            stream.name, stream.type = result.name, result.type
            stream.shape = result.shape.copy() if result.shape is not None else stream.shape
            result.name = None
        result.replace_all_uses_with(stream, replace_graph_outputs=True)
        self._graph.remove(add, safe=True)

    def _merge(self, home: _Home, bias: ir.Value) -> None:
        """Puts the sum of two biases where one of them is; small, so both are read here."""
        old = home.node.inputs[home.slot]
        assert old is not None
        assert old.const_value is not None
        assert bias.const_value is not None
        wide = np.float64
        total = array_of(old.const_value).astype(wide) + array_of(bias.const_value).astype(wide)
        dtype = bias.const_value.dtype.numpy()
        bias.const_value = ir.tensor(total.astype(dtype), name=bias.name)
        home.node.replace_input_with(home.slot, bias)
        own = old in self.replaced or old not in self._biases
        if drop_unused_weight(self._graph, old) and own:
            self.replaced.add(bias)

    def _add_before(self, home: _Home, bias: ir.Value, name: str | None) -> None:
        operand = home.node.inputs[home.slot]
        assert operand is not None
        add = ir.Node("", "Add", [operand, bias], name=name)
        result = add.outputs[0]
        result.name, result.type = name, bias.type
        result.shape = None if operand.shape is None else operand.shape.copy()
        self._graph.insert_before(home.node, add)
        home.node.replace_input_with(home.slot, result)
        self.made.add(add)
