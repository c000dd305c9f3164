"""What the tests of the surgery share: graphs, how they run, and the oracle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graph_passes import (
    Deletion,
    PassReport,
    Refusal,
    ReplacementTensors,
    ResidualSite,
    SublayerRef,
    SurgeryError,
    find_sites,
    prune_graph,
)
from graph_passes.cleanup import CleanupPass
from graph_passes.pipeline import graph_size
from graph_passes.testing import masked_model
from graph_passes.types import DeletionKind, Replacement
from tests.graph_passes.fused_graphs import FUSED, fused_model
from tests.tiny_graphs import TinySpec, check_clean, check_tidy, tiny_feed, tiny_model

T = TypeVar("T")
Arrays = dict[str, np.ndarray[Any, Any]]
Given = dict[SublayerRef, ReplacementTensors]

SPECS = {
    "pre_norm": TinySpec(),
    "post_norm_encoder": TinySpec(form="post_norm", cache=False),
    "post_norm_decoder": TinySpec(form="post_norm"),
    "sandwich": TinySpec(form="sandwich"),
    "norm_after": TinySpec(form="norm_after"),
    "multiplier": TinySpec(form="multiplier"),
    "parallel": TinySpec(form="parallel"),
    "parallel_in_turn": TinySpec(form="parallel_in_turn"),
    "split_mlp": TinySpec(form="split_mlp"),
    "past_from_last": TinySpec(past_from=2),
    "gathered_past": TinySpec(past_from=1, gather_past=True),
    "mask_in_branch": TinySpec(mask_in_branch=True),
    "multi_output": TinySpec(fused=True),
    "tied": TinySpec(tied=True),
    "router": TinySpec(router=True),
    "unannotated": TinySpec(annotated=False),
}
GRAPHS = (*SPECS, *FUSED)
"""Plain operators, and those of ONNX Runtime."""
PLAN = [Deletion(1, "attention"), Deletion(2, "mlp")]


def tiny(name: str, layers: int = 3) -> ir.Model:
    """A graph of some layers, in plain operators or in fused ones."""
    if name in FUSED:
        return fused_model(replace(FUSED[name], layers=layers))
    spec = SPECS[name]
    return tiny_model(replace(spec, layers=layers, past_from=min(spec.past_from, layers - 1)))


def tolerance(name: str) -> float:
    """A plain norm and a fused one round differently."""
    return 1e-6 if name in FUSED else 0.0


def session(model: ir.Model, folder: Path | None = None, *, optimise: bool = False) -> Any:
    """An ONNX Runtime session; without its optimisations, sums are taken as the graph says."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(running: Any, feed: Arrays) -> Arrays:
    """Runs a session, or a model, with those of the inputs that it declares."""
    if isinstance(running, ir.Model):
        running = session(running)
    wanted = {value.name for value in running.get_inputs()}
    names = [value.name for value in running.get_outputs()]
    outputs = running.run(names, {k: v for k, v in feed.items() if k in wanted})
    return dict(zip(names, outputs, strict=True))


def largest_difference(expected: Arrays, actual: Arrays, gone: Iterable[str] = ()) -> float:
    """The largest difference over all outputs; the sets of outputs must be as declared."""
    assert set(actual) == set(expected) - set(gone)
    assert actual
    worst = 0.0
    for name, have in actual.items():
        assert have.shape == expected[name].shape, name
        assert np.isfinite(expected[name]).all(), name
        if have.size:
            worst = max(worst, float(np.abs(expected[name] - have).max()))
    return worst


def logits_apart(one: ir.Model, other: ir.Model) -> float:
    """The smallest over the feeds of the largest difference of the logits of two models."""
    first, second = session(one), session(other)
    return min(
        float(np.abs(run(first, feed)["logits"] - run(second, feed)["logits"]).max())
        for feed in feeds(one)
    )


def feeds(model: ir.Model) -> list[Arrays]:
    """Prefill and decode for a decoder, one run for an encoder."""
    left = 0 if model.graph.name == "fused" else 1
    if any((value.name or "").startswith("past") for value in model.graph.inputs):
        return [tiny_feed(model, seq=4, left=left), tiny_feed(model, seq=1, past=3, left=left)]
    return [tiny_feed(model, seq=4, left=left)]


def oracle_error(
    model: ir.Model,
    deletions: Sequence[Deletion],
    given: Mapping[SublayerRef, ReplacementTensors] | None = None,
    *,
    other: Mapping[SublayerRef, ReplacementTensors] | None = None,
    optimise: bool = False,
    allow_all: bool = False,
) -> float:
    """The largest difference between the cut graph and the masked original with replacements.

    It is relative to the largest output where that is above 1. The oracle may be given ``other``
    numbers. Whatever the result computes, it has to be clean, and its report to add up.
    """
    pruned, report = pruned_soundly(model, deletions, given, allow_all=allow_all)
    gone = [name for entry in report.deleted for name in entry.outputs_removed]
    oracle = masked_model(model, deletions, given if other is None else other)
    expected, actual = session(oracle, optimise=optimise), session(pruned, optimise=optimise)
    worst = 0.0
    for feed in feeds(model):
        want = run(expected, feed)
        scale = max(float(np.abs(array).max(initial=1)) for array in want.values())
        worst = max(worst, largest_difference(want, run(actual, feed), gone) / scale)
    return worst


def pruned_soundly(
    model: ir.Model,
    deletions: Sequence[Deletion],
    given: Mapping[SublayerRef, ReplacementTensors] | None = None,
    *,
    allow_all: bool = False,
) -> tuple[ir.Model, PassReport]:
    """A cut that leaves the caller's model alone, nothing dead, and a report that adds up."""
    before = text(model)
    pruned, report = prune_graph(model, deletions, replacements=given or {}, allow_all=allow_all)
    assert text(model) == before
    standard = {node.domain for node in model.graph} == {""}
    (check_clean if standard else check_tidy)(pruned)
    assert (report.before, report.after) == (graph_size(model), graph_size(pruned))
    parameters = sum(e.parameters_removed - e.parameters_added for e in report.deleted)
    alive = model.clone()
    CleanupPass()(alive)
    assert parameters == graph_size(alive).parameters - report.after.parameters
    for field in ("inputs", "outputs"):
        gone = {name for entry in report.deleted for name in getattr(entry, f"{field}_removed")}
        old, new = (
            [(v.name, v.dtype, v.shape) for v in getattr(m.graph, field) if not v.is_initializer()]
            for m in (model, pruned)
        )
        assert [value for value in old if value[0] not in gone] == new
    for field in ("ir_version", "producer_name", "domain", "model_version", "doc_string"):
        assert getattr(pruned, field) == getattr(model, field)
    assert pruned.opset_imports == model.opset_imports
    assert pruned.metadata_props["depthcut.plan"]
    assert not_ours(pruned) == not_ours(model)
    return pruned, report


def not_ours(model: ir.Model) -> dict[str, str]:
    return {k: v for k, v in model.metadata_props.items() if not k.startswith("depthcut.")}


def numbers(
    model: ir.Model,
    deletions: Iterable[Deletion],
    *,
    seed: int = 0,
    dtype: Any = np.float32,
) -> Given:
    """Random numbers for every replacement that is asked for."""
    rng = np.random.default_rng(seed)
    hidden = 32 if model.graph.name == "fused" else 8
    given = {}
    for deletion in deletions:
        for site in sites_of(model):
            if not deletion.names(site.ref) or deletion.replacement == "none":
                continue
            bias = rng.standard_normal(hidden).astype(dtype)
            if deletion.replacement == "bias":
                given[site.ref] = ReplacementTensors(bias)
            else:
                weight = (rng.standard_normal((hidden, hidden)) / hidden**0.5).astype(dtype)
                given[site.ref] = ReplacementTensors(bias, weight)
    return given


def plan(*entries: tuple[DeletionKind, int, Replacement]) -> list[Deletion]:
    return [Deletion(layer, kind, replacement) for kind, layer, replacement in entries]


def sites_of(model: ir.Model) -> list[ResidualSite]:
    return [site for site in find_sites(model) if isinstance(site, ResidualSite)]


def kinds(model: ir.Model) -> list[tuple[int, str]]:
    return [(site.layer, site.kind) for site in sites_of(model)]


def usual(layers: int = 3) -> list[tuple[int, str]]:
    """An attention and an MLP in each layer."""
    return [(layer, kind) for layer in range(layers) for kind in ("attention", "mlp")]


def all_deletions(model: ir.Model) -> list[Deletion]:
    return [Deletion(site.layer, site.kind) for site in sites_of(model)]


def proper_subsets(items: Sequence[T]) -> list[list[T]]:
    """Every subset but the empty one and the whole."""
    return [list(c) for n in range(1, len(items)) for c in combinations(items, n)]


def refusals(model: ir.Model) -> list[Refusal]:
    return [item for item in find_sites(model) if isinstance(item, Refusal)]


def check_refused(
    model: ir.Model, code: str, places: Sequence[tuple[int, str]] = (), field: str = ""
) -> None:
    """Some sublayers, or the whole graph, are refused for one reason; what is left can be cut."""
    result = refusals(model)
    assert [(r.layer, r.kind) for r in result] == (list(places) or [(None, None)])
    assert {r.code for r in result} == {code}
    before = text(model)
    for refusal in result:
        assert field in f"{refusal.node} {refusal.reason}"
        deletion = Deletion(refusal.layer or 0, refusal.kind or "mlp")
        with pytest.raises(SurgeryError) as caught:
            prune_graph(model, [deletion])
        assert caught.value.code in ([code] if places else [code, "sublayer-missing"])
        assert refusal.node in str(caught.value)
    assert text(model) == before


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def value_of(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def put_behind(model: ir.Model, value: ir.Value, *nodes: ir.Node) -> None:
    """Has all others read the last of some new nodes in a value's place."""
    last, producer = nodes[-1].outputs[0], value.producer()
    assert producer is not None
    for user, slot in list(value.uses()):
        if user not in nodes and user.graph is model.graph:
            user.replace_input_with(slot, last)
    model.graph.insert_after(producer, nodes)


def publish(model: ir.Model, value: ir.Value, name: str, *dims: int | str) -> None:
    """Makes a value an output; its shape is left where none is said."""
    value.name = name
    if dims:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
    model.graph.outputs.append(value)


def text(model: ir.Model) -> str:
    weights = sorted(model.graph.initializers)
    return ir.to_onnx_text(model, exclude_initializers=True) + str((weights, model.metadata_props))
