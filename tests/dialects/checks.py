"""What is asked of every dialect: sites, cuts equal to the masked oracle, a clean graph."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from exporter.cut.random_inputs import cases, draw, half_written
from exporter.engines.runners.sessions import in_float32, widened_arrays
from graph_passes import Deletion, PassReport, Refusal, ResidualSite, find_sites, prune_graph
from graph_passes.files.storage import load_model, save_model
from graph_passes.testing import masked_model
from tests.dialects.makers import Workshop
from tests.dialects.registry import Dialect
from tests.tiny_graphs import check_tidy

Arrays = dict[str, np.ndarray[Any, Any]]

LAYERS = 3
_UNKNOWN_NORM = ("No Op registered for LayerN", "No Op registered for SimplifiedLayerN")
_VISIBLE = 1e-3  # what masking a branch must change at least, relative to the largest value
_EXPECTED = [(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp")]


@dataclass(frozen=True)
class Outcome:
    """What was seen of one dialect."""

    nodes: int
    opset: int
    sites: int = 0
    cuts: int = 0
    worst: float | None = None
    fused: int = 0
    runtime_nodes: tuple[int, int] | None = None
    valid: bool = False
    reason: str = ""


def check(dialect: Dialect, shop: Workshop, *, depth: bool = True, random_sets: int = 6) -> Outcome:
    """Makes the dialect's graph, cuts it in many ways, and judges each result."""
    path = shop.make(dialect.name, dialect.make, LAYERS)
    model = load_model(path)
    result = find_sites(model)
    facts = {"nodes": len(model.graph), "opset": model.graph.opset_imports.get("", 0)}
    if dialect.refused:
        (refusal,) = result
        assert isinstance(refusal, Refusal), "a graph that must be refused was searched"
        return Outcome(**facts, reason=refusal.reason)
    sites = [site for site in result if isinstance(site, ResidualSite)]
    assert sites == result, f"refused: {[str(site) for site in result if site not in sites]}"
    assert [(site.layer, site.kind) for site in sites] == _EXPECTED
    bench = _Bench(path, model, dialect)
    sets = list(_deletions(sites, random_sets))
    worst = max(bench.error(item, alone=len(item) == 1) for item in sets)
    assert worst <= dialect.tolerance, f"worst relative error {worst:.1e}"
    counted = depth and dialect.runs and dialect.stays is not None
    counts = _runtime_nodes(dialect, shop, bench) if counted else None
    return Outcome(
        **facts, sites=len(sites), cuts=len(sets), worst=worst, fused=_fused_sums(model),
        runtime_nodes=counts, valid=bench.valid,
    )  # fmt: skip


def _deletions(sites: Sequence[ResidualSite], random_sets: int) -> Iterator[list[Deletion]]:
    """Every sublayer alone, then random sets; all attentions at the end."""
    everything = [Deletion(site.layer, site.kind) for site in sites]
    yield from ([deletion] for deletion in everything)
    chance = random.Random(0)
    for _ in range(random_sets):
        yield chance.sample(everything, chance.randint(2, len(everything) - 1))
    yield [deletion for deletion in everything if deletion.kind == "attention"]


class _Bench:
    """One uncut graph, and what is measured against it."""

    def __init__(self, path: Path, model: ir.Model, dialect: Dialect) -> None:
        self.path, self.model, self.dialect = path, model, dialect
        rng = np.random.default_rng(0)
        feeds = [draw(model, case, rng) for case in cases(model)]
        self.feeds = [widened_arrays(feed) for feed in feeds] if not dialect.runs else feeds
        self.plain = self._run(model)
        self.valid = _check_error(path) is None

    def error(self, asked: list[Deletion], *, alone: bool) -> float:
        """Cuts, judges the result's form, and gives its largest relative error."""
        pruned, report = prune_graph(self.model, asked)
        self._check_form(pruned, report)
        expected, actual = self._run(masked_model(self.model, asked)), self._run(pruned)
        gone = {name for entry in report.deleted for name in entry.outputs_removed}
        vague = half_written(self.model)
        if alone:
            change = _largest(self.plain, expected, set(), vague)
            assert change > _VISIBLE, f"masking {asked} changes only {change:.1e}"
        return _largest(expected, actual, gone, vague)

    def _check_form(self, pruned: ir.Model, report: PassReport) -> None:
        check_tidy(pruned)
        fused = _fused_sums(self.model)
        joints = {node.name for node in self.model.graph if _is_fused_sum(node)}
        died = sum(entry.residual_add in joints for entry in report.deleted)
        assert _fused_sums(pruned) == fused - died, "a sum was taken apart that could stay fused"
        if self.valid:
            target = self.path.parent / "cut" / "model.onnx"
            save_model(pruned, target)
            error = _check_error(target)
            # Where a fused norm has to stand alone, ONNX Runtime's own name for it may be younger
            # than the graph's opset: LayerNormalization before 17, SimplifiedLayerNormalization.
            assert error is None or (fused and error.startswith(_UNKNOWN_NORM)), error

    def _run(self, model: ir.Model) -> list[Arrays]:
        if not self.dialect.runs:
            model = in_float32(model)
        options = _options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(self.path.parent))
        data = exact_activations(ir.to_proto(model)).SerializeToString()
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        wanted = {value.name for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        feeds = [{k: v for k, v in feed.items() if k in wanted} for feed in self.feeds]
        return [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]


def _largest(
    expected: list[Arrays], actual: list[Arrays], gone: set[str], vague: set[str]
) -> float:
    """The largest difference of any output, relative to that output's largest value."""
    worst = 0.0
    for want, have in zip(expected, actual, strict=True):
        assert set(have) == set(want) - gone
        for name, array in have.items():
            assert array.shape == want[name].shape, name
            if name in vague:
                continue
            assert np.isfinite(want[name]).all(), name
            scale = float(np.abs(want[name]).max(initial=0.0))
            difference = np.abs(want[name].astype(np.float64) - array.astype(np.float64))
            if scale:
                worst = max(worst, float(difference.max(initial=0.0)) / scale)
    return worst


def _fused_sums(model: ir.Model) -> int:
    return sum(map(_is_fused_sum, model.graph))


def _is_fused_sum(node: ir.Node) -> bool:
    return node.op_type in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def _check_error(path: Path) -> str | None:
    """What onnx's full check, shape inference included, has against a file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker's and shape inference's own classes
        return str(error).strip().splitlines()[0]
    return None


def _runtime_nodes(dialect: Dialect, shop: Workshop, bench: _Bench) -> tuple[int, int]:
    """Nodes after ONNX Runtime's optimisation: one block cut out, and never written."""
    shallow = shop.make(dialect.name, dialect.make, LAYERS - 1)
    folder = bench.path.parent / "optimised"
    cut, target = folder / "cut.onnx", folder / "target.onnx"
    save_model(prune_graph(bench.model, [Deletion(1, "block")])[0], cut)
    counts = [len(ir.load(optimised_copy(path, target)).graph) for path in (cut, shallow)]
    assert counts[0] <= counts[1] + (dialect.stays or 0), f"nodes cut, never written: {counts}"
    return counts[0], counts[1]


def optimised_copy(source: Path, target: Path) -> Path:
    """What ONNX Runtime makes of a graph for its CPU kernels, hardware layouts aside."""
    options = _options(ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target


def _options(level: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return options


def exact_activations(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Products with packed weights in float32: in int8, a last place grows to a whole step."""
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return proto
