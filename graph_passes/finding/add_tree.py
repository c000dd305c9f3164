"""Takes a residual sum apart: the skip, and the branches that join it there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from graph_passes.finding.dataflow import Dominators, GraphIndex, is_add
from graph_passes.finding.shapes import CHANGES_OF_FORM


@dataclass(frozen=True)
class Leaf:
    """One operand of a tree of Adds, the Add that takes it, and the nodes back to the skip."""

    joint: ir.Node
    value: ir.Value
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class AddTree:
    """A sum on the stream, with inner Adds flattened: ``skip + leaf + leaf + ...``."""

    add: ir.Node
    skip: ir.Value
    leaves: tuple[Leaf, ...]
    joints: frozenset[ir.Node]
    strangers: tuple[ir.Value, ...] = ()

    @cached_property
    def nodes(self) -> frozenset[ir.Node]:
        """Every node between the skip and the sum."""
        return frozenset(self.joints).union(*(leaf.nodes for leaf in self.leaves))


def take_apart(index: GraphIndex, dominators: Dominators, add: ir.Node) -> AddTree | None:
    """The tree of a sum; None where no operand is what another one is computed from."""
    if not _joins_activations(index, add):
        return None
    joints = {add}
    operands = [
        (joint, value)
        for joint, value in _operands(index, add, joints)
        if dominators.descends(value)
    ]
    skip = _skip(index, dominators, add, [value for _, value in operands])
    if skip is None:
        return None
    origin = common_origin(dominators, add, skip)
    leaves, strangers = [], []
    for joint, value in operands:
        if value is skip:
            continue
        nodes = nodes_between(index, dominators, origin, value)
        if any(origin in index.data_reads(node) for node in nodes):
            leaves.append(Leaf(joint, value, frozenset(nodes)))
        else:
            strangers.append(value)
    return AddTree(add, skip, tuple(leaves), frozenset(joints), tuple(strangers))


def _joins_activations(index: GraphIndex, node: ir.Node) -> bool:
    return is_add(node) and all(value in index.varying for value in node.inputs)


def _operands(
    index: GraphIndex, add: ir.Node, joints: set[ir.Node]
) -> Iterator[tuple[ir.Node, ir.Value]]:
    queue = [(add, value) for value in reversed(add.inputs)]
    while queue:
        joint, value = queue.pop()
        assert value is not None
        chain = _inner_sum(index, value)
        if chain:
            joints.update(chain)
            queue.extend((chain[-1], operand) for operand in reversed(chain[-1].inputs))
        else:
            yield joint, value


def _inner_sum(index: GraphIndex, operand: ir.Value) -> list[ir.Node]:
    """The sum that an operand is, if it is only part of another, behind its changes of type.

    The stream itself always has a second reader.
    """
    chain: list[ir.Node] = []
    for value in _forms(operand):
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return []
        chain.append(node)
    return chain if _joins_activations(index, chain[-1]) else []


def _skip(
    index: GraphIndex, dominators: Dominators, add: ir.Node, operands: list[ir.Value]
) -> ir.Value | None:
    """The operand that another one is computed from.

    As a rule it dominates the sum, or is another form of what does. It doesn't where a branch
    also reads what an earlier sublayer computed; then it is the latest operand that another one
    descends from.
    """
    if len(operands) < 2:
        return None
    immediate = dominators.immediate(add.outputs[0])
    for value in operands:
        if immediate in _forms(value):
            return value
    later = [value for value in operands if _feeds_another(index, dominators, value, operands)]
    return max(later, key=lambda value: _place(index, value), default=None)


def common_origin(dominators: Dominators, add: ir.Node, skip: ir.Value) -> ir.Value:
    """Where the branches of a sum leave the stream: the skip, or the same in an earlier form.

    In quantised graphs the branch and the sum may each dequantise the stream for itself.
    """
    immediate = dominators.immediate(add.outputs[0])
    return immediate if immediate in _forms(skip) else skip


def _forms(value: ir.Value) -> list[ir.Value]:
    """A value, and what it is before a change of type."""
    forms = [value]
    node = value.producer()
    while node is not None and node.op_type in CHANGES_OF_FORM:
        above = node.inputs[0]
        if above is None:
            break
        forms.append(above)
        node = above.producer()
    return forms


def _feeds_another(
    index: GraphIndex, dominators: Dominators, value: ir.Value, operands: list[ir.Value]
) -> bool:
    return any(
        other is not value
        and _place(index, other) > _place(index, value)
        and any(
            value in index.data_reads(node)
            for node in nodes_between(index, dominators, value, other)
        )
        for other in operands
    )


def _place(index: GraphIndex, value: ir.Value) -> int:
    producer = value.producer()
    return -1 if producer is None else index.position[producer]


def nodes_between(
    index: GraphIndex, dominators: Dominators, start: ir.Value, end: ir.Value
) -> set[ir.Node]:
    """The nodes on data paths to ``end`` that stand after ``start`` in the graph.

    Where ``start`` dominates ``end``, these are the nodes between the two.
    """
    first = _place(index, start)
    nodes: set[ir.Node] = set()
    queue = [end]
    while queue:
        value = queue.pop()
        node = value.producer()
        if node is None or node in nodes or value is start or not dominators.descends(value):
            continue
        if index.position[node] > first:
            nodes.add(node)
            queue.extend(index.data_reads(node))
    return nodes
