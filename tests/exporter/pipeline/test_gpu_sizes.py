from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from exporter.pipeline.gpu.llama_shaped import LlamaShape, write_llama
from exporter.pipeline.gpu.sizes import Sizes

SHAPE = LlamaShape(
    layers=4, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=100,
    dtype=ir.DataType.BFLOAT16,
)  # fmt: skip


def test_the_weights_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.onnx", SHAPE)
    model = ir.load(path)
    weights = [value for value in model.graph.initializers.values() if value.name[:1] != "c"]
    sizes = Sizes.of(SHAPE)
    assert sizes.weights + sizes.embedding == sum(value.const_value.nbytes for value in weights)


def test_a_step_reads_weights_and_cache() -> None:
    whole, cut = Sizes.of(SHAPE), Sizes.of(SHAPE, dropped=2)
    assert whole.cache_per_token == 2 * 4 * 32 * 2
    assert cut.cache_per_token * 2 == whole.cache_per_token
    assert whole.step_bytes(3, 10) == whole.weights + 30 * whole.cache_per_token
    assert cut.weights < whole.weights


def test_a_smaller_cache_leaves_room_for_more_sequences() -> None:
    whole, cut = Sizes.of(SHAPE), Sizes.of(SHAPE, dropped=2)
    total = 20_000_000
    assert 0 < whole.largest_batch(total, 256) < cut.largest_batch(total, 256)
    assert whole.largest_batch(total, 256, copies=2) < whole.largest_batch(total, 256)
    assert whole.largest_batch(whole.weights, 256) == 0
