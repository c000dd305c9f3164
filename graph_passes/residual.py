"""The only code that rewires the residual stream."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graph_passes.errors import SurgeryError
from graph_passes.finding.dataflow import is_add
from graph_passes.finding.shapes import CHANGES_OF_FORM
from graph_passes.locate import FoundSite


def remove_branches(
    graph: ir.Graph, site: FoundSite, displaced: ir.Value | None = None
) -> list[ir.Node]:
    """Takes all branches of a sublayer out of the stream: ``x + f(x)`` becomes ``x``."""
    branches = [leaf.value for leaf in site.tree.leaves]
    return [
        remove_branch(graph, leaf.value, site.tree.joints, branches)
        for leaf in site.leaves
        if leaf.value is not displaced
    ]


def remove_branch(
    graph: ir.Graph,
    branch: ir.Value,
    joints: Collection[ir.Node] | None = None,
    others: Collection[ir.Value] = (),
) -> ir.Node:
    """Takes a branch out of the sum that it joins.

    The branch is picked by identity, not by its place in the Add. The operand that stays takes
    over the sum's readers, and its name, type and shape where the sum is a graph output; where
    both are public, an Identity keeps the two names apart. In a tree of Adds the other leaves
    stay where they are.
    """
    branch, add = _joint(graph, branch, joints)
    kept = next(value for value in add.inputs if value is not branch)
    assert kept is not None
    total = add.outputs[0]
    if kept not in others:
        _carry_annotations(total, kept)
    if total.is_graph_output():
        kept = _publish(graph, add, kept)
    total.replace_all_uses_with(kept, replace_graph_outputs=True)
    graph.remove(add, safe=True)
    return add


def _joint(
    graph: ir.Graph, branch: ir.Value, joints: Collection[ir.Node] | None
) -> tuple[ir.Value, ir.Node]:
    """The sum that a branch joins, and its operand there: the branch, or another form of it."""
    readers = [user for user, _ in branch.uses() if joints is None or user in joints]
    adds = [user for user in readers if is_add(user)]
    if not adds and len(readers) == 1 and readers[0].op_type in CHANGES_OF_FORM:
        return _joint(graph, readers[0].outputs[0], joints)
    if len(adds) != 1 or adds[0].graph is not graph:
        raise SurgeryError(f"The branch {branch.name!r} joins {len(adds)} sums instead of one.")
    return branch, adds[0]


def _carry_annotations(total: ir.Value, kept: ir.Value) -> None:
    if kept.shape is None and total.shape is not None:
        kept.shape = total.shape.copy()
    if kept.type is None:
        kept.type = total.type


def _publish(graph: ir.Graph, add: ir.Node, kept: ir.Value) -> ir.Value:
    """Gives the value that stays the sum's public name, through an Identity if it has one."""
    total = add.outputs[0]
    name = total.name
    total.name = None
    if kept.is_graph_output() or kept.is_graph_input() or kept.is_initializer():
        identity = ir.Node("", "Identity", [kept], name=add.name)
        graph.insert_before(add, identity)
        kept = identity.outputs[0]
    kept.name = name
    kept.type = total.type or kept.type
    kept.shape = total.shape.copy() if total.shape is not None else kept.shape
    return kept
