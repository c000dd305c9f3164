"""The dominator tree of a graph's values, seen from one input."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graph_passes.finding.dataflow import GraphIndex


class Dominators:
    """For each value that data flows to from ``source``: the last value on all paths to it.

    The graph is acyclic and in order, so one pass is enough: a value's immediate dominator is
    the nearest common ancestor, in the tree so far, of what its node reads. The walks to it are
    as long as a branch, so the cost is linear in the number of nodes.
    """

    def __init__(
        self, index: GraphIndex, source: ir.Value, nodes: Iterable[ir.Node] | None = None
    ) -> None:
        self.source = source
        self._parent: dict[ir.Value, ir.Value] = {}
        self._depth: dict[ir.Value, int] = {source: 0}
        for node in index.nodes if nodes is None else nodes:
            self._add(index, node)

    def _add(self, index: GraphIndex, node: ir.Node) -> None:
        common: ir.Value | None = None
        for value in index.data_reads(node):
            if value in self._depth:
                common = value if common is None else self._meet(common, value)
        if common is not None:
            for output in node.outputs:
                self._parent[output] = common
                self._depth[output] = self._depth[common] + 1

    def _meet(self, one: ir.Value, other: ir.Value) -> ir.Value:
        while one is not other:
            if self._depth[one] < self._depth[other]:
                one, other = other, one
            one = self._parent[one]
        return one

    def descends(self, value: ir.Value) -> bool:
        """Whether data flows from the source to ``value``."""
        return value in self._depth

    def immediate(self, value: ir.Value) -> ir.Value:
        """The last value before ``value`` on all paths to it; not for the source."""
        return self._parent[value]
