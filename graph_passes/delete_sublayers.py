"""The pass that deletes sublayers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from graph_passes import fused_norms, kv_cache
from graph_passes.bias_folding import BiasFolder
from graph_passes.cleanup import Swept, sweep
from graph_passes.errors import SurgeryError
from graph_passes.finding.dataflow import is_shape_read
from graph_passes.finding.shapes import carried_dims
from graph_passes.fused_norms import Apart
from graph_passes.locate import Findings, FoundSite, locate, survey
from graph_passes.plan_record import RecordedReplacement, record, recorded, recorded_replacements
from graph_passes.replacement_nodes import PutIn, put_in, spare_input
from graph_passes.replacements import FittedReplacement, ReplacementTensors, fit
from graph_passes.residual import remove_branches
from graph_passes.selection import check_recorded, replacements_of, select
from graph_passes.types import DeletedSublayer, Deletion, Refusal, SublayerRef

_WEIGHTS_ARE_NO_INPUTS = 4  # the IR version since when they need not be


@dataclass
class DeletionResult(ir.passes.PassResult):
    """A pass result that says what was deleted, and what could not have been."""

    deleted: tuple[DeletedSublayer, ...] = field(default=())
    refused: tuple[Refusal, ...] = field(default=())
    kv_renumbering: dict[str, str] = field(default_factory=dict)


class DeleteSublayersPass(ir.passes.InPlacePass):
    """Deletes sublayers in place; what it can't delete it refuses before it changes anything.

    What the model's own record names as deleted earlier is passed over, so a second run changes
    nothing. :func:`graph_passes.prune_graph`, which explains all arguments, wraps it so that the
    caller's model survives.
    """

    def __init__(
        self,
        deletions: Sequence[Deletion],
        *,
        replacements: Mapping[SublayerRef, ReplacementTensors] | None = None,
        renumber_kv: bool = False,
        allow_all: bool = False,
    ) -> None:
        super().__init__()
        self.deletions = tuple(deletions)
        self.replacements = dict(replacements or {})
        self.renumber_kv = renumber_kv
        self.allow_all = allow_all

    def call(self, model: ir.Model) -> DeletionResult:
        """Finds the sublayers, then takes them out.

        Raises:
            SurgeryError: The graph is not as the deletions suppose. Raised before any change,
                except where a length or shape turns out to be needed that no survivor has.
        """
        findings, sites = self._choose(model, survey(model))
        refused = tuple(r for r in findings.describe() if isinstance(r, Refusal))
        kinds = replacements_of(sites, self.deletions)
        fitted = fit(sites, kinds, self.replacements, recorded(model))
        if not sites:
            names = _renumber(model, findings.sites) if self.renumber_kv else {}
            return DeletionResult(model, bool(names), refused=refused, kv_renumbering=names)
        # Taken apart, the graph has names that no inference takes.
        dying = chain.from_iterable(site.dying for site in sites)
        declare_what_is_asked(model, {value.name for node in dying for value in node.outputs})
        parts = fused_norms.take_apart(model.graph)
        if parts:  # so the survey was made of a copy
            findings, sites = self._choose(model, locate(model))
        chosen = {site.ref for site in sites}
        survivors = [site for site in findings.sites if site.ref not in chosen]
        cut = _Cut(model.graph, parts, sites, survivors)
        deleted, replaced = cut.delete(fitted)
        if model.ir_version < _WEIGHTS_ARE_NO_INPUTS:
            own = model.graph.initializers.values()  # what came in, too
            model.graph.inputs.extend(value for value in own if not value.is_graph_input())
        names = _renumber(model, survivors) if self.renumber_kv else {}
        record(model, {ref: RecordedReplacement() for ref in chosen} | replaced)
        return DeletionResult(model, True, deleted, refused, names)

    def _choose(self, model: ir.Model, findings: Findings) -> tuple[Findings, list[FoundSite]]:
        sites = select(findings, self.deletions, recorded(model), allow_all=self.allow_all)
        check_recorded(self.deletions, sites, recorded_replacements(model), self.replacements)
        return findings, sites

    def ensures(self, model: ir.Model) -> None:
        """No node reads a value that the graph no longer gives."""
        known = {*model.graph.inputs, *model.graph.initializers.values()}
        for node in model.graph:
            missing = [v for v in node.inputs if v is not None and v not in known]
            if missing:
                raise SurgeryError(f"The cut left {node.name!r} without {missing[0].name!r}.")
            known.update(node.outputs)


class _Cut:
    """One cut through a graph of which the fused sums are taken apart."""

    def __init__(
        self,
        graph: ir.Graph,
        parts: Sequence[Apart],
        sites: Sequence[FoundSite],
        survivors: Sequence[FoundSite],
    ) -> None:
        self._graph = graph
        self._parts = parts
        self._sites = sites
        self._survivors = survivors

    def delete(
        self, fitted: Mapping[SublayerRef, FittedReplacement]
    ) -> tuple[tuple[DeletedSublayer, ...], dict[SublayerRef, RecordedReplacement]]:
        """Puts the replacements in, takes the branches out, and joins what was taken apart."""
        put = put_in(self._graph, self._sites, fitted)
        linear = {ref for ref, replacement in fitted.items() if replacement.weight is not None}
        sites = [spare_input(site) if site.ref in linear else site for site in self._sites]
        add_names = [site.tree.add.name or "" for site in sites]
        swept = self._take_out(sites, put)
        folder = BiasFolder(self._graph, self._parts, self._survivors)
        homes = folder.fold(put.values())
        biases = folder.made.union(item.bias for item in put.values())
        fused_norms.join(self._graph, self._parts, biases)
        entries = tuple(map(_entry, sites, add_names, swept))
        replaced = {
            ref: RecordedReplacement(replacement.kind, replacement.digest, homes.get(ref, ()))
            for ref, replacement in fitted.items()
        }
        added = {ref: self._parameters_of(item, folder.replaced) for ref, item in put.items()}
        return tuple(_with_replacement(entry, fitted, added) for entry in entries), replaced

    def _take_out(
        self, sites: Sequence[FoundSite], put: Mapping[SublayerRef, PutIn]
    ) -> list[Swept]:
        graph = self._graph
        uncounted = {node for part in self._parts for node in part.extra}
        kv_cache.drop_outputs(graph, [value for site in sites for value in site.outputs])
        swept = []
        for site in sites:
            displaced = put[site.ref].displaced if site.ref in put else None
            adds = remove_branches(graph, site, displaced)
            swept.append(_sweep_behind(graph, site, adds, uncounted))
        stand_ins = _stand_ins(graph, sites, self._survivors)
        place = {node: i for i, node in enumerate(graph)}
        for site, count in zip(sites, swept, strict=True):
            leftovers = _leftovers(place, site)
            values = chain(site.caches, *(node.outputs for node in leftovers))
            kv_cache.resource_shape_reads(graph, values, stand_ins)
            count.add(sweep(graph, leftovers))
        for site, count in zip(sites, swept, strict=True):
            count.add(sweep(graph, _leftovers(place, site)))
        _check_swept(place, sites)
        kv_cache.drop_inputs(graph, [value for site in sites for value in site.caches])
        return swept

    def _parameters_of(self, put: PutIn, replaced: Collection[ir.Value]) -> int:
        """How many numbers the graph holds for a replacement that it hasn't held before."""
        own = [v for v in put.weights if self._graph.initializers.get(v.name or "") is v]
        tensors = [value.const_value for value in own if value not in replaced]
        return sum(tensor.size for tensor in tensors if tensor is not None)


def _leftovers(place: Mapping[ir.Node, int], site: FoundSite) -> list[ir.Node]:
    """The nodes that should have gone with a site but are still there, in graph order."""
    left = (node for node in site.dying if node.graph is not None and node in place)
    return sorted(left, key=place.__getitem__)


def _check_swept(place: Mapping[ir.Node, int], sites: Sequence[FoundSite]) -> None:
    """Makes sure that no part of a deleted sublayer is still computed for its mere shape."""
    for site in sites:
        for node in _leftovers(place, site):
            reader, value = _last_reader(node, site)
            raise SurgeryError(
                f"{site.ref} would still be computed: {reader.op_type} {reader.name!r} reads the "
                f"shape of {value.name!r}, and no input that stays is known to have the same.",
                "Declare the shapes in the graph, or leave it out of the plan.",
                code="still-computed",
            )


def _last_reader(node: ir.Node, site: FoundSite) -> tuple[ir.Node, ir.Value]:
    """The node outside the site for whose sake a node is still there."""
    while True:
        reader, value = next((user, v) for v in node.outputs for user, _ in v.uses())
        if reader not in site.dying:
            return reader, value
        node = reader


def _sweep_behind(
    graph: ir.Graph, site: FoundSite, adds: Sequence[ir.Node], uncounted: Collection[ir.Node]
) -> Swept:
    """Takes out what a site's branches leave behind once they are out of the stream.

    A fused sum and norm are one node of the model, so the sum isn't counted.
    """
    producers = (leaf.value.producer() for leaf in site.leaves)
    # Changes of type between two sums stand behind the branch, so they go first.
    ends = chain(site.tree.joints, (value.producer() for value in site.outputs))
    swept = sweep(graph, chain(producers, ends))
    gone = (node for node in (*adds, *site.dying) if node.graph is not graph)
    swept.nodes += len(adds) - sum(node in uncounted for node in gone)
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


def _with_replacement(
    entry: DeletedSublayer,
    fitted: Mapping[SublayerRef, FittedReplacement],
    added: Mapping[SublayerRef, int],
) -> DeletedSublayer:
    ref = SublayerRef(entry.layer, entry.kind)
    if ref not in fitted:
        return entry
    return replace(entry, replacement=fitted[ref].kind, parameters_added=added[ref])


def _renumber(model: ir.Model, survivors: Sequence[FoundSite]) -> dict[str, str]:
    caches = [value for site in survivors for value in site.caches]
    if caches:
        outputs = [value for site in survivors if site.caches for value in site.outputs]
    else:  # a first step takes no cache, but gives those that the steps after it take
        made = chain.from_iterable(site.outputs for site in survivors if site.kind != "mlp")
        outputs = [value for value in made if kv_cache.is_numbered(value)]
    # The survey may have been made of a copy.
    own = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    return kv_cache.renumber(
        model, [own[value.name] for value in caches], [own[value.name] for value in outputs]
    )


def declare_what_is_asked(model: ir.Model, names: Collection[str | None]) -> None:
    """Declares the shapes of those values that something asks for their mere shape.

    What is declared already stays; where inference can't tell, nothing changes. Weights are not
    needed. A graph that declares its shapes costs no inference.
    """
    values = {
        value.name: value
        for node in model.graph
        for value in node.outputs
        if value.name in names
        and carried_dims(value) is None
        and any(is_shape_read(user) for user, _ in value.uses())
    }
    if not values:
        return
    copy = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    for node in copy.graph:
        for output in node.outputs:
            if output.name in values and output.shape is not None:
                value = values[output.name]
                value.shape, value.type = output.shape.copy(), value.type or output.type
