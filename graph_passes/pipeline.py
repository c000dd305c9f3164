"""The public entry: the ordered passes, all or nothing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import onnx_ir as ir

from graph_passes.cleanup import CleanupPass
from graph_passes.delete_sublayers import DeleteSublayersPass, DeletionResult
from graph_passes.errors import SurgeryError
from graph_passes.finding.preconditions import graph_refusal
from graph_passes.finding.weights import constant_weight, is_weight, parameters, place
from graph_passes.replacements import ReplacementTensors
from graph_passes.types import Deletion, GraphSize, PassReport, SublayerRef


def prune_graph(
    model: ir.Model,
    deletions: Sequence[Deletion],
    *,
    replacements: Mapping[SublayerRef, ReplacementTensors] | None = None,
    renumber_kv: bool = False,
    keep_debug: bool = False,
    allow_all: bool = False,
) -> tuple[ir.Model, PassReport]:
    """Deletes sublayers from a Transformer's graph.

    The result computes what the model computes with the deleted branches multiplied by zero, plus
    their replacements where they have one: ``bias`` adds ``b``, ``linear`` adds ``W x + b``,
    where ``x`` is what the branch was computed from (:attr:`ResidualSite.branch_input`). A bias
    may be added to one that the graph holds already. Weights are shared with the original and
    never read, such a bias excepted. The plan stands in the result's ``metadata_props`` under
    ``depthcut.plan``, details of replacements under ``depthcut.replacements``.

    Args:
        model: The model; it is unchanged afterwards, whether this succeeds or fails.
        deletions: What to delete; ``block`` stands for every sublayer of its layer. Something
            named twice counts once.
        replacements: The numbers for the deletions that name a replacement, for a block those of
            each of its sublayers.
        renumber_kv: Gives the caches that are left dense numbers in their names, and writes the
            map into the metadata under ``depthcut.kv_renumbering``.
        keep_debug: Keeps the exporter's stack traces and notes, which may hold local paths.
        allow_all: Lets every sublayer go, which leaves what stands before and behind them.

    Returns:
        The pruned model and the report of what went.

    Raises:
        SurgeryError: The graph, a named sublayer, the numbers of a replacement, or how the model
            was cut before don't allow it.
    """
    if refusal := graph_refusal(model):
        where = f"At node {refusal.node!r}: " if refusal.node else ""
        raise SurgeryError(f"{where}{refusal.reason}.", code=refusal.code)
    pruned = model.clone()
    result = DeleteSublayersPass(
        deletions, replacements=replacements, renumber_kv=renumber_kv, allow_all=allow_all
    )(pruned)
    assert isinstance(result, DeletionResult)
    CleanupPass(keep_debug=keep_debug)(pruned)
    sizes = graph_size(model), graph_size(pruned)
    return pruned, PassReport(result.deleted, result.refused, *sizes, result.kv_renumbering)


def graph_size(model: ir.Model) -> GraphSize:
    """Counts nodes and weights, those in bodies of If and Loop included. No weight is read.

    Integer and truth-value initializers are shape arithmetic and masks, not weights. A matrix
    that is packed in bytes has as many parameters as it has numbers. One that several operators
    read, in whatever shapes, counts once.
    """
    protocols = (constant_weight(node) for node in model.graph.all_nodes())
    constants = [tensor for tensor in protocols if tensor is not None]
    held: dict[Hashable, tuple[int, int]] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in filter(is_weight, graph.initializers.values()):
            tensor = value.const_value
            assert tensor is not None
            before = held.get(place(tensor), (0, 0))
            held[place(tensor)] = max(before, (parameters(value), tensor.nbytes))
    return GraphSize(
        nodes=sum(1 for _ in model.graph.all_nodes()),
        parameters=sum(count for count, _ in held.values()) + sum(t.size for t in constants),
        bytes=sum(size for _, size in held.values()) + sum(t.nbytes for t in constants),
    )
