"""What a graph tells about its KV cache."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.models.graph_facts import read_facts


def _cache(name: str, length: str, head_size: int | str) -> ir.Value:
    shape = ir.Shape(["batch", 2, length, head_size])
    return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))


@pytest.mark.parametrize("declared", [8, "kv_cache_dim"])
@pytest.mark.parametrize(("name", "expected"), [("past_key_values.0.key", 2 * 8 * 4), ("mask", 0)])
def test_a_token_in_the_cache_has_all_its_bytes(
    declared: int | str, name: str, expected: int, tmp_path: Path
) -> None:
    past, new = _cache(name, "past", declared), _cache("new", "sequence", 8)
    total = _cache("present.0.key", "total", 8)
    append = ir.node("Concat", [past, new], {"axis": 2}, outputs=[total])
    graph = ir.Graph([past, new], [total], nodes=[append], opset_imports={"": 20}, name="cache")
    path = tmp_path / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    assert read_facts(path).kv_cache_bytes_per_token == expected
