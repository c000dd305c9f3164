"""Takes a sum on the residual stream apart: the skip, and the branches that join it there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.dataflow import Stream, is_add, is_shape_read
from graph_passes.labels import branch_kind, contracts
from graph_passes.types import SublayerKind


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

    def nodes(self) -> set[ir.Node]:
        """Every node between the skip and the sum."""
        return set(self.joints).union(*(leaf.nodes for leaf in self.leaves))


def take_apart(stream: Stream, add: ir.Node) -> AddTree | None:
    """The tree of a sum; None where no operand, or none but one, comes from the stream.

    Args:
        stream: The residual stream.
        add: An Add whose sum lies on it.
    """
    joints = {add}
    operands = list(_operands(stream, add, joints))
    skip = _skip(stream, operands)
    if skip is None:
        return None
    leaves = tuple(
        Leaf(joint, value, frozenset(nodes_between(stream, skip, value)))
        for joint, value in operands
        if value is not skip and stream.descends(value)
    )
    return AddTree(add, skip, leaves, frozenset(joints))


def joins(stream: Stream) -> int:
    """How many sums of the stream join a skip with something that descends from it."""
    return sum(_joins(stream, list(_operands(stream, add, set()))) for add in stream.sums())


def _joins(stream: Stream, operands: list[tuple[ir.Node, ir.Value]]) -> bool:
    skip = _skip(stream, operands)
    return skip is not None and any(
        value is not skip and stream.descends(value) for _, value in operands
    )


def _skip(stream: Stream, operands: list[tuple[ir.Node, ir.Value]]) -> ir.Value | None:
    skips = [value for _, value in operands if stream.carries(value)]
    return skips[0] if len(skips) == 1 else None


def _operands(
    stream: Stream, add: ir.Node, joints: set[ir.Node]
) -> Iterator[tuple[ir.Node, ir.Value]]:
    for value in add.inputs:
        assert value is not None
        inner = value.producer()
        if inner is not None and _is_inner(stream, inner):
            joints.add(inner)
            yield from _operands(stream, inner, joints)
        else:
            yield add, value


def _is_inner(stream: Stream, node: ir.Node) -> bool:
    total = node.outputs[0]
    return (
        is_add(node)
        and all(value in stream.index.varying for value in node.inputs)
        and not stream.carries(total)
        and len(total.uses()) == 1
        and not total.is_graph_output()
    )


def nodes_between(stream: Stream, skip: ir.Value, end: ir.Value) -> set[ir.Node]:
    """The nodes on data paths from ``skip`` to ``end``.

    The skip dominates, so nothing that descends from the source gets round it.
    """
    found: set[ir.Node] = set()
    queue = [end]
    while queue:
        value = queue.pop()
        node = value.producer()
        if node is None or node in found or value is skip or not stream.descends(value):
            continue
        found.add(node)
        queue.extend(stream.index.data_reads(node))
    return found


def branches_by_kind(stream: Stream, tree: AddTree) -> dict[SublayerKind, list[Leaf]]:
    """The leaves that are branches of a sublayer; leaves of one kind go together."""
    kinds: dict[SublayerKind, list[Leaf]] = {}
    for leaf in tree.leaves:
        if contracts(leaf.nodes):
            kinds.setdefault(branch_kind(stream, leaf.nodes), []).append(leaf)
    return kinds


def foreign_reader(stream: Stream, tree: AddTree, leaf: Leaf) -> ir.Node | None:
    """A node outside the tree that uses what the branch computes on the way to the output."""
    inside = tree.nodes()
    for reader in _readers(stream, leaf.nodes):
        outside = reader not in inside and not is_shape_read(reader)
        if outside and any(stream.reaches_output(value) for value in reader.outputs):
            return reader
    return None


def own_outputs(stream: Stream, leaf: Leaf) -> list[ir.Value]:
    """The graph outputs that the branch feeds beside the sum: its caches, its router's logits."""
    found = {value: None for node in leaf.nodes for value in node.outputs}
    seen = set(leaf.nodes)
    queue = list(leaf.nodes)
    while queue:
        for reader in _readers(stream, [queue.pop()]):
            if reader in seen or is_shape_read(reader):
                continue
            seen.add(reader)
            if not any(stream.reaches_output(value) for value in reader.outputs):
                found.update(dict.fromkeys(reader.outputs))
                queue.append(reader)
    return [value for value in stream.index.graph.outputs if value in found]


def _readers(stream: Stream, nodes: frozenset[ir.Node] | list[ir.Node]) -> Iterator[ir.Node]:
    for node in nodes:
        for value in node.outputs:
            yield from stream.index.readers(value)
