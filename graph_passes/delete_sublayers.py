"""The pass that deletes sublayers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import onnx_ir as ir

from graph_passes import fused_norms, kv_cache
from graph_passes.cleanup import Swept, sweep
from graph_passes.errors import SurgeryError
from graph_passes.fused_norms import Apart
from graph_passes.inference import declare_what_is_asked
from graph_passes.locate import FoundSite, locate, survey
from graph_passes.plan_record import record, recorded
from graph_passes.residual import remove_branch
from graph_passes.selection import select
from graph_passes.types import DeletedSublayer, Deletion, Refusal


@dataclass
class DeletionResult(ir.passes.PassResult):
    """A pass result that says what was deleted, and what could not have been."""

    deleted: tuple[DeletedSublayer, ...] = field(default=())
    refused: tuple[Refusal, ...] = field(default=())
    kv_renumbering: dict[str, str] = field(default_factory=dict)


class DeleteSublayersPass(ir.passes.InPlacePass):
    """Deletes sublayers in place; what it can't delete it refuses before it changes anything.

    What the model's own record names as deleted earlier is passed over, so a second run changes
    nothing. :func:`graph_passes.prune_graph` wraps it so that the caller's model survives.

    Args:
        deletions: What to delete. A block stands for every sublayer of its layer.
        renumber_kv: Whether the caches that are left get dense numbers.
    """

    def __init__(self, deletions: Sequence[Deletion], *, renumber_kv: bool = False) -> None:
        super().__init__()
        self.deletions = tuple(deletions)
        self.renumber_kv = renumber_kv

    def call(self, model: ir.Model) -> DeletionResult:
        """Finds the sublayers, then takes them out.

        Raises:
            SurgeryError: The graph is not as the deletions suppose. Raised before any change,
                except where a length or shape turns out to be needed that no survivor has.
        """
        findings = survey(model)
        sites = select(findings, self.deletions, recorded(model))
        refused = tuple(r for r in findings.describe() if isinstance(r, Refusal))
        if not sites:
            return DeletionResult(model, modified=False, refused=refused)
        # Taken apart, the graph has names that no inference takes.
        declare_what_is_asked(model, _names_that_die(sites))
        parts = fused_norms.take_apart(model.graph)
        if parts:  # so the survey was made of a copy
            findings = locate(model)
            sites = select(findings, self.deletions, recorded(model))
        chosen = set(sites)
        survivors = [site for site in findings.sites if site not in chosen]
        deleted = _delete(model.graph, sites, survivors, parts)
        fused_norms.join(model.graph, parts)
        names = _renumber(model, survivors) if self.renumber_kv else {}
        record(model, (site.ref for site in sites))
        return DeletionResult(model, True, deleted, refused, names)

    def ensures(self, model: ir.Model) -> None:
        """No node reads a value that the graph no longer gives."""
        known = {*model.graph.inputs, *model.graph.initializers.values()}
        for node in model.graph:
            missing = [v for v in node.inputs if v is not None and v not in known]
            if missing:
                raise SurgeryError(f"The cut left {node.name!r} without {missing[0].name!r}.")
            known.update(node.outputs)


def _delete(
    graph: ir.Graph,
    sites: Sequence[FoundSite],
    survivors: Sequence[FoundSite],
    parts: Iterable[Apart],
) -> tuple[DeletedSublayer, ...]:
    uncounted = {node for part in parts for node in part.extra}
    kv_cache.drop_outputs(graph, [value for site in sites for value in site.outputs])
    add_names = [site.tree.add.name or "" for site in sites]
    swept = [_cut(graph, site, uncounted) for site in sites]
    stand_ins = _stand_ins(graph, sites, survivors)
    for site, count in zip(sites, swept, strict=True):
        leftovers = _leftovers(graph, site)
        values = chain(site.caches, *(node.outputs for node in leftovers))
        kv_cache.resource_shape_reads(graph, values, stand_ins)
        count.add(sweep(graph, leftovers))
    for site, count in zip(sites, swept, strict=True):
        count.add(sweep(graph, _leftovers(graph, site)))
    _check_swept(graph, sites)
    kv_cache.drop_inputs(graph, [value for site in sites for value in site.caches])
    return tuple(map(_entry, sites, add_names, swept))


def _names_that_die(sites: Iterable[FoundSite]) -> set[str | None]:
    dying = chain.from_iterable(site.dying for site in sites)
    return {value.name for node in dying for value in node.outputs}


def _leftovers(graph: ir.Graph, site: FoundSite) -> list[ir.Node]:
    """The nodes that should have gone with a site but are still there, in graph order."""
    return [node for node in graph if node in site.dying]


def _check_swept(graph: ir.Graph, sites: Sequence[FoundSite]) -> None:
    """Makes sure that no part of a deleted sublayer is still computed for its mere shape."""
    for site in sites:
        for node in _leftovers(graph, site):
            reader, value = _last_reader(node, site)
            raise SurgeryError(
                f"{site.ref} would still be computed: {reader.op_type} {reader.name!r} reads the "
                f"shape of {value.name!r}, and no input that stays is known to have the same.",
                "Declare the shapes in the graph, or leave it out of the plan.",
            )


def _last_reader(node: ir.Node, site: FoundSite) -> tuple[ir.Node, ir.Value]:
    """The node outside the site for whose sake a node is still there."""
    while True:
        reader, value = next((user, v) for v in node.outputs for user, _ in v.uses())
        if reader not in site.dying:
            return reader, value
        node = reader


def _cut(graph: ir.Graph, site: FoundSite, uncounted: Collection[ir.Node]) -> Swept:
    """Takes a site's branches out of the stream and sweeps up behind them.

    A fused sum and norm are one node of the model, so the sum isn't counted.
    """
    producers = [leaf.value.producer() for leaf in site.leaves]
    adds = [remove_branch(graph, leaf.value, site.tree.joints) for leaf in site.leaves]
    # Changes of type between two sums stand behind the branch, so they go first.
    ends = chain(site.tree.joints, (value.producer() for value in site.outputs))
    swept = sweep(graph, chain(producers, ends))
    swept.nodes += len(adds) - sum(node in uncounted for node in (*adds, *site.dying))
    return swept


def _stand_ins(
    graph: ir.Graph, sites: Sequence[FoundSite], survivors: Iterable[FoundSite]
) -> list[ir.Value]:
    """What may be asked for a shape instead: other caches first, then any input that stays."""
    caches = dict.fromkeys(chain.from_iterable(site.caches for site in survivors))
    gone = set(chain.from_iterable(site.caches for site in sites))
    return [*caches, *(v for v in graph.inputs if v not in gone and v not in caches)]


def _entry(site: FoundSite, add_name: str, swept: Swept) -> DeletedSublayer:
    return DeletedSublayer(
        layer=site.layer,
        kind=site.kind,
        replacement="none",
        residual_add=add_name,
        nodes_removed=swept.nodes,
        parameters_removed=swept.parameters,
        inputs_removed=tuple(value.name or "" for value in site.caches),
        outputs_removed=tuple(value.name or "" for value in site.outputs),
    )


def _renumber(model: ir.Model, survivors: Sequence[FoundSite]) -> dict[str, str]:
    outputs = [value for site in survivors if site.caches for value in site.outputs]
    caches = [value for site in survivors for value in site.caches]
    return kv_cache.renumber(model, caches, outputs)
