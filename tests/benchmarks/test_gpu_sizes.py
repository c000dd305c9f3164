from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.benchmarks.gpu_sizes import Sizes
from tests.llama_shaped import LlamaShape, write_llama

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


@pytest.mark.parametrize(("sequence", "past"), [(1, 7), (5, 0)])
def test_attention_as_one_operator_computes_the_same(
    sequence: int, past: int, tmp_path: Path
) -> None:
    import onnxruntime as ort

    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(0, 100, (2, sequence)),
        "attention_mask": np.ones((2, past + sequence), np.int64),
    }
    for layer, part in product(range(4), ("key", "value")):
        cache = rng.standard_normal((2, 2, past, 16))
        feed[f"past_key_values.{layer}.{part}"] = cache.astype(np.float32)
    found = []
    for fused in (False, True):
        shape = replace(SHAPE, dtype=ir.DataType.FLOAT, fused_attention=fused)
        path = write_llama(tmp_path / f"{fused}.onnx", shape, noise=0.1)
        found.append(ort.InferenceSession(str(path)).run(None, feed))
    assert np.abs(found[0][0]).max() > 0.1
    for plain, one in zip(*found, strict=True):
        np.testing.assert_allclose(one, plain, rtol=1e-5, atol=1e-5)


def test_a_step_reads_weights_and_cache() -> None:
    whole, cut = Sizes.of(SHAPE), Sizes.of(SHAPE, dropped=2)
    assert whole.cache_per_token == 2 * 4 * 32 * 2
    assert cut.cache_per_token * 2 == whole.cache_per_token
    assert whole.step_bytes(3, 10) == whole.weights + 30 * whole.cache_per_token
    assert cut.weights < whole.weights


def test_a_smaller_cache_leaves_room_for_more_sequences() -> None:
    whole, cut = Sizes.of(SHAPE), Sizes.of(SHAPE, dropped=2)
    free = 20_000_000
    assert 0 < whole.largest_batch(free, free, 256) < cut.largest_batch(free, free, 256)
    assert whole.largest_batch(whole.weights, free, 256) == 0
    twice = whole.largest_batch(free + whole.weights + whole.embedding, free, 256, profiles=2)
    assert twice == whole.largest_batch(free, free, 256)
