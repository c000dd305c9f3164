"""A cut before or after: the same weights, the same logits; a replacement's matrix goes along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings, Scheme
from graph_passes import Deletion, ReplacementTensors, SublayerRef, find_sites, prune_graph
from graph_passes.files.storage import load_model
from graph_passes.types import ResidualSite
from tests.tiny_graphs import HIDDEN, TinySpec, saved, tiny_feed, tiny_model

CUT = [Deletion(1, "attention"), Deletion(2, "block")]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return saved(tiny_model(TinySpec(tied=True)), tmp_path, "whole.onnx")


def cut(source: Path, target: Path, *deletions: Deletion, **more: Any) -> Path:
    pruned, _ = prune_graph(load_model(source), deletions or CUT, **more)
    return saved(pruned, target.parent, target.name)


def quantised(source: Path, target: Path, scheme: Scheme = "int4") -> Path:
    quantize_file(source, target, QuantizeSettings(scheme=scheme, block_size=16))
    return target


def sites(path: Path) -> list[tuple[object, ...]]:
    return [
        (site.layer, site.kind)
        for site in find_sites(load_model(path))
        if isinstance(site, ResidualSite)
    ]


def weights(path: Path) -> dict[str, bytes]:
    model = load_model(path)
    return {
        name: value.const_value.tobytes()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def logits(path: Path) -> np.ndarray:  # type: ignore[type-arg]
    feed = tiny_feed(load_model(path), seq=5)
    with OnnxRuntimeRunner(path, threads=1) as runner:
        return runner.run(feed, ["logits"])["logits"]


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_cutting_and_quantising_in_either_order_is_the_same(
    whole: Path, tmp_path: Path, scheme: Scheme
) -> None:
    first = quantised(cut(whole, tmp_path / "c.onnx"), tmp_path / "cq.onnx", scheme)
    last = cut(quantised(whole, tmp_path / "q.onnx", scheme), tmp_path / "qc.onnx")
    notes = [load_model(path).metadata_props["depthcut.plan"] for path in (first, last)]
    assert notes[0] == notes[1] == load_model(tmp_path / "c.onnx").metadata_props["depthcut.plan"]
    assert sites(first) == sites(last) == [(0, "attention"), (0, "mlp"), (1, "mlp")]
    assert weights(first) == weights(last)
    np.testing.assert_array_equal(logits(first), logits(last))
    assert np.abs(logits(first) - logits(tmp_path / "c.onnx")).max() > 1e-4


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_cut_takes_the_same_parameters_from_both(
    whole: Path, tmp_path: Path, scheme: Scheme
) -> None:
    packed = quantised(whole, tmp_path / "q.onnx", scheme)
    assert sites(packed) == sites(whole)
    assert len(sites(whole)) == 6
    gone = []
    for path in (whole, packed):
        report = prune_graph(load_model(path), CUT)[1]
        gone.append(report.before.parameters - report.after.parameters)
        assert sum(entry.parameters_removed for entry in report.deleted) == gone[-1]
    assert gone[0] == gone[1] > 0


@pytest.mark.parametrize(("replacement", "more"), [("linear", 1), ("bias", 0)])
def test_the_matrices_of_a_replacement_are_quantised_too(
    whole: Path, tmp_path: Path, replacement: str, more: int
) -> None:
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float32) for _ in range(more)]
    numbers = ReplacementTensors(rng.standard_normal(HIDDEN).astype(np.float32), *maps)
    replaced = cut(
        whole, tmp_path / "cut.onnx", Deletion(1, "attention", replacement),  # type: ignore[arg-type]
        replacements={SublayerRef(1, "attention"): numbers},
    )  # fmt: skip
    quantised(replaced, tmp_path / "q.onnx")
    plain = cut(whole, tmp_path / "plain.onnx", Deletion(1, "attention"))
    assert products(tmp_path / "q.onnx") == products(quantised(plain, tmp_path / "p.onnx")) + more
    kinds = {
        value.dtype for value in load_model(tmp_path / "q.onnx").graph.initializers.values()
        if value.shape is not None and tuple(value.shape.numpy()) == (HIDDEN, HIDDEN)
    }  # fmt: skip
    assert ir.DataType.FLOAT not in kinds


def products(path: Path) -> int:
    return sum(node.op_type == "MatMulNBits" for node in load_model(path).graph)
