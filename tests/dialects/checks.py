"""What is asked of every dialect: sites, cuts equal to the masked oracle, a clean graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from exporter.cut.random_inputs import cases, draw, half_written
from exporter.engines.runners.sessions import in_float32, widened_arrays
from exporter.errors import first_line
from graph_passes import Deletion, PassReport, Refusal, ResidualSite, find_sites, prune_graph
from graph_passes.files.storage import load_model, save_model
from graph_passes.testing import masked_model
from tests.dialects.makers import fused_by_runtime
from tests.dialects.registry import Dialect, Workshop
from tests.tiny_graphs import check_tidy
from tests.trials import Arrays, Cut, cuts, random_cuts, run_named, session_of

LAYERS = 3
_UNKNOWN_NORM = ("No Op registered for LayerN", "No Op registered for SimplifiedLayerN")
_VISIBLE = 1e-3  # what masking a branch must change at least, relative to the largest value


@dataclass(frozen=True)
class Outcome:
    """What was seen of one dialect."""

    opset: int
    worst: float = 0.0
    reason: str = ""


def check(
    dialect: Dialect,
    shop: Workshop,
    *,
    layers: int = LAYERS,
    depth: bool = True,
    random_sets: int = 6,
) -> Outcome:
    """Makes the dialect's graph, cuts it in many ways, and judges each result."""
    path = shop.make(dialect.name, layers)
    model = load_model(path)
    sites, opset = find_sites(model), model.graph.opset_imports.get("", 0)
    if dialect.refused:
        (refusal,) = sites
        assert isinstance(refusal, Refusal), "a graph that must be refused was searched"
        return Outcome(opset, reason=refusal.reason)
    refused = [str(site) for site in sites if not isinstance(site, ResidualSite)]
    assert not refused, f"refused: {refused}"
    expected = [(layer, kind) for layer in range(layers) for kind in ("attention", "mlp")]
    assert [(site.layer, site.kind) for site in sites] == expected  # type: ignore[union-attr]
    bench = _Bench(path, model, dialect)
    refs = [site.ref for site in sites]  # type: ignore[union-attr]
    worst = max(map(bench.error, [*cuts(refs), *random_cuts(refs, dialect.name, random_sets)]))
    assert worst <= dialect.tolerance, f"worst relative error {worst:.1e}"
    if depth and dialect.runs and dialect.stays is not None:
        _compare_runtime_nodes(bench, shop.make(dialect.name, layers - 1), dialect.stays)
    return Outcome(opset, worst)


class _Bench:
    """One uncut graph, and what is measured against it."""

    def __init__(self, path: Path, model: ir.Model, dialect: Dialect) -> None:
        self.path, self.model, self._runs = path, model, dialect.runs
        rng = np.random.default_rng(0)
        self._feeds: list[Any] = [draw(model, case, rng) for case in cases(model)]
        if not self._runs:
            self._feeds = [widened_arrays(feed) for feed in self._feeds]
        self._plain, self._vague = self._run(model), half_written(model)
        self._valid = _check_error(path) is None

    def error(self, cut: Cut) -> float:
        """Cuts, judges the result's form, and gives its largest relative error."""
        plan = [Deletion(ref.layer, ref.kind) for ref in sorted(cut)]
        pruned, report = prune_graph(self.model, plan)
        self._check_form(pruned, report)
        expected, actual = self._run(masked_model(self.model, plan)), self._run(pruned)
        gone = {name for entry in report.deleted for name in entry.outputs_removed}
        if len(cut) == 1:
            change = self._largest(self._plain, expected, set())
            assert change > _VISIBLE, f"masking {plan} changes only {change:.1e}"
        return self._largest(expected, actual, gone)

    def _check_form(self, pruned: ir.Model, report: PassReport) -> None:
        check_tidy(pruned)
        fused = {node.name for node in self.model.graph if _is_fused_sum(node)}
        died = sum(entry.residual_add in fused for entry in report.deleted)
        left = sum(map(_is_fused_sum, pruned.graph))
        assert left == len(fused) - died, "a sum was taken apart that could stay fused"
        if self._valid:
            target = self.path.parent / "cut" / "model.onnx"
            save_model(pruned, target)
            error = _check_error(target)
            # Where a fused norm has to stand alone, ONNX Runtime's own name for it may be younger
            # than the graph's opset: LayerNormalization before 17, SimplifiedLayerNormalization.
            assert error is None or (fused and error.startswith(_UNKNOWN_NORM)), error

    def _run(self, model: ir.Model) -> list[Arrays]:
        session = session_of(model if self._runs else in_float32(model), self.path.parent)
        return [run_named(session, feed) for feed in self._feeds]

    def _largest(self, expected: list[Arrays], actual: list[Arrays], gone: set[str]) -> float:
        """The largest difference of any output, relative to that output's largest value."""
        worst = 0.0
        for want, have in zip(expected, actual, strict=True):
            assert set(have) == set(want) - gone
            for name in have.keys() - self._vague:
                first, second = want[name].astype(np.float64), have[name].astype(np.float64)
                assert first.shape == second.shape, name
                assert np.isfinite(first).all(), name
                if scale := float(np.abs(first).max(initial=0.0)):
                    worst = max(worst, float(np.abs(first - second).max(initial=0.0)) / scale)
        return worst


def _is_fused_sum(node: ir.Node) -> bool:
    return node.op_type in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def _check_error(path: Path) -> str | None:
    """What onnx's full check, shape inference included, has against a file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker's and shape inference's own classes
        return first_line(error)
    return None


def _compare_runtime_nodes(bench: _Bench, shallower: Path, stays: int) -> None:
    """Nodes after ONNX Runtime's optimisation: one block cut out, and never written."""
    folder = bench.path.parent / "optimised"
    save_model(prune_graph(bench.model, [Deletion(1, "block")])[0], folder / "cut.onnx")
    paths = (folder / "cut.onnx", shallower)
    cut, written = (len(ir.load(fused_by_runtime(folder, path)).graph) for path in paths)
    assert cut <= written + stays, f"nodes cut, never written: {cut}, {written}"
