"""Fractional zero points as whole ones and further rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.quantize.products import find_products
from exporter.quantize.rewrite import Blocks, PackedWeights, drop_unused, use_in_product
from exporter.quantize.weight_only import BlockSums, with_whole_zero_points
from graph_passes.files.storage import load_model, save_model
from graph_passes.files.weight_file import WeightWriter
from tests.text_graphs import written

DEPTH, WIDTH, BLOCK = 96, 40, 16
TWO_READERS = f"""<ir_version: 10, opset_import: ["": 20]>
small (float[batch, rows, {DEPTH}] x) => (float[batch, rows, {WIDTH}] y)
<float[{DEPTH}, {WIDTH}] first, float[{DEPTH}, {WIDTH}] second> {{
  [one] a = MatMul(x, first)
  [two] b = MatMul(x, second)
  y = Add(a, b)
}}"""


def blocks(bits: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(seed)
    count = DEPTH // BLOCK
    quants = rng.integers(0, 1 << bits, (WIDTH, count, BLOCK)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.02, (WIDTH, count)).astype(np.float32)
    # Some lie outside the range, as those of blocks that are all of one sign.
    return quants, scales, rng.uniform(-2, 1 << bits, (WIDTH, count)).astype(np.float32)


def meant(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:  # type: ignore[type-arg]
    quants, scales, offsets = parts
    return ((quants - offsets[..., None]) * scales[..., None]).reshape(WIDTH, DEPTH)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("bits", "level", "limit"), [(4, 1, 2e-5), (4, 4, 0.03), (8, 1, 2e-5), (8, 4, 0.02)]
)
def test_products_with_fractions(tmp_path: Path, bits: int, level: int, limit: float) -> None:
    model = load_model(written(TWO_READERS, tmp_path / "model.onnx"))
    made = {"one": blocks(bits, 1), "two": blocks(bits, 2)}
    with WeightWriter(tmp_path / "packed.data") as writer:
        store = PackedWeights(model, writer)
        sums = BlockSums(store, level)
        products = find_products(model).products
        for product in products:
            fitted = with_whole_zero_points(Blocks(*made[product.name], bits), level)
            assert fitted.sums == (1 if level == 4 else {4: 4, 8: 2}[bits])
            stored = store.store(fitted.blocks, product.weight)
            follow = sums.follow(product, BLOCK, fitted.sums)
            use_in_product(product, stored, bits, BLOCK, level, follow)
        drop_unused(model, [product.weight for product in products])
    assert sum(node.op_type == "Concat" for node in model.graph) == 1
    save_model(model, tmp_path / "out.onnx")
    x = np.random.default_rng(3).standard_normal((2, 3, DEPTH)).astype(np.float32) + 1
    with OnnxRuntimeRunner(tmp_path / "out.onnx", threads=1) as runner:
        y = runner.run({"x": x})["y"]
    wanted = x @ (meant(made["one"]) + meant(made["two"])).T
    np.testing.assert_allclose(y, wanted, rtol=0, atol=limit * np.abs(wanted).max())


def test_whole_offsets_need_no_further_rows(tmp_path: Path) -> None:
    quants, scales, offsets = blocks(4, 1)
    whole = np.clip(np.round(offsets), 0, 15)
    fitted = with_whole_zero_points(Blocks(quants, scales, whole, 4), 4)
    assert fitted.sums == 0
    model = load_model(written(TWO_READERS, tmp_path / "model.onnx"))
    weight = find_products(model).products[0].weight
    middle = Blocks(quants, scales, np.full_like(whole, 8), 4)
    with WeightWriter(tmp_path / "packed.data") as writer:
        store = PackedWeights(model, writer)
        assert store.store(fitted.blocks, weight).zeros is not None
        stored = store.store(with_whole_zero_points(middle, 4).blocks, weight)
    assert stored.zeros is None
    assert stored.quants.dtype == ir.DataType.UINT8
