"""What the tests of the surgery share: running graphs, and the graphs themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from graph_passes import Deletion, ResidualSite, find_sites, prune_graph
from graph_passes.testing import masked_model
from tests.graph_passes.fused_graphs import FUSED, fused_feed, fused_model
from tests.tiny_graphs import TinySpec, tiny_feed, tiny_model
from tests.tiny_graphs import check_clean as check_clean
from tests.tiny_graphs import check_tidy as check_tidy

T = TypeVar("T")
Arrays = dict[str, np.ndarray[Any, Any]]

SPECS = {
    "pre_norm": TinySpec(),
    "post_norm_encoder": TinySpec(form="post_norm", cache=False),
    "post_norm_decoder": TinySpec(form="post_norm"),
    "sandwich": TinySpec(form="sandwich"),
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


def session(model: ir.Model, folder: Path | None = None, *, optimise: bool) -> Any:
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
    """Runs a session with those of the inputs that it declares."""
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


def feeds(model: ir.Model) -> list[Arrays]:
    """Prefill and decode for a decoder, one run for an encoder."""
    feed = fused_feed if model.graph.name == "fused" else tiny_feed
    if any((value.name or "").startswith("past") for value in model.graph.inputs):
        return [feed(model, seq=4), feed(model, seq=1, past=3)]
    return [feed(model, seq=4)]


def oracle_error(
    model: ir.Model,
    deletions: Sequence[Deletion],
    *,
    optimise: bool = False,
    allow_all: bool = False,
) -> float:
    """The largest difference between the pruned graph and the masked original."""
    pruned, report = prune_graph(model, deletions, allow_all=allow_all)
    gone = [name for entry in report.deleted for name in entry.outputs_removed]
    expected = session(masked_model(model, deletions), optimise=optimise)
    actual = session(pruned, optimise=optimise)
    return max(
        largest_difference(run(expected, feed), run(actual, feed), gone) for feed in feeds(model)
    )


def sites_of(model: ir.Model) -> list[ResidualSite]:
    return [site for site in find_sites(model) if isinstance(site, ResidualSite)]


def smaller(name: str) -> ir.Model:
    """The same form with two layers, for tests that go through all subsets."""
    if name in FUSED:
        return fused_model(FUSED[name])
    spec = SPECS[name]
    return tiny_model(replace(spec, layers=2, past_from=min(spec.past_from, 1)))


def all_deletions(model: ir.Model) -> list[Deletion]:
    return [Deletion(site.layer, site.kind) for site in sites_of(model)]


def proper_subsets(items: Sequence[T]) -> list[list[T]]:
    """Every subset but the empty one and the whole."""
    return [list(c) for n in range(1, len(items)) for c in combinations(items, n)]


def text(model: ir.Model) -> str:
    return ir.to_onnx_text(model, exclude_initializers=True) + str(sorted(model.graph.initializers))


def tiny(name: str) -> ir.Model:
    """A graph of three layers, in plain operators or in fused ones."""
    if name in FUSED:
        return fused_model(replace(FUSED[name], layers=3))
    return tiny_model(SPECS[name])


def tolerance(name: str) -> float:
    """A plain norm and a fused one round differently; the largest logit is about 0.7."""
    return 1e-6 if name in FUSED else 0.0
