"""The decoders with random weights that a GPU session measures."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.export.forms.tensorrt import rewrite_decoder
from tests.llama_shaped import LlamaShape, write_llama

SHAPE = LlamaShape(
    layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=100,
    dtype=ir.DataType.FLOAT,
)  # fmt: skip


def logits(path: Path, sequence: int, past: int) -> Any:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path))
    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(0, 100, (2, sequence)),
        "attention_mask": np.ones((2, past + sequence), np.int64),
        "position_ids": np.tile(np.arange(past, past + sequence), (2, 1)),
    }
    for layer, part in product(range(2), ("key", "value")):
        cache = rng.standard_normal((2, 2, past, 16))
        feed[f"past_key_values.{layer}.{part}"] = cache.astype(np.float32)
    names = {item.name for item in session.get_inputs()}
    assert ("position_ids" in names) == ("positions" in path.stem)
    return session.run(["logits"], {name: feed[name] for name in names})[0]


@pytest.mark.parametrize(("sequence", "past"), [(1, 7), (5, 0)])
def test_positions_and_attention_in_every_form_compute_the_same(
    sequence: int, past: int, tmp_path: Path
) -> None:
    result = []
    for fused, positions in product((False, True), repeat=2):
        shape = replace(SHAPE, fused_attention=fused, positions=positions)
        path = tmp_path / f"{fused}-{'positions' if positions else ''}.onnx"
        result.append(logits(write_llama(path, shape, noise=0.1), sequence, past))
    assert np.abs(result[0]).max() > 0.1
    for item in result[1:]:
        np.testing.assert_allclose(item, result[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [False, True])
def test_only_with_positions_its_caches_can_lie_in_place(positions: bool, tmp_path: Path) -> None:
    shape = replace(SHAPE, fused_attention=True, positions=positions)
    model = ir.load(write_llama(tmp_path / "m.onnx", shape))
    _, passes, remark = rewrite_decoder(model, 64)
    assert (passes, remark is None) == (
        (("CacheInPlacePass(64)",), True) if positions else ((), False)
    )
