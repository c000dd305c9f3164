"""Small float graphs with weights that fill whole blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.files.storage import save_model

VOCABULARY, WIDTH, INNER = 48, 64, 96

TIED = f"""<ir_version: 10, opset_import: ["": 20]>
small (int64[batch, seq] input_ids) => (float[batch, seq, {VOCABULARY}] logits)
<float[{VOCABULARY}, {WIDTH}] table, float[{WIDTH}, {INNER}] up, float[{INNER}, {WIDTH}] down> {{
  hidden = Gather(table, input_ids)
  [up_node] inner = MatMul(hidden, up)
  active = Relu(inner)
  [down_node] branch = MatMul(active, down)
  sum = Add(hidden, branch)
  turned = Transpose<perm = [1, 0]>(table)
  [head_node] logits = MatMul(sum, turned)
}}"""

ONLY_HEAD = f"""<ir_version: 10, opset_import: ["": 20]>
small (int64[batch, seq] input_ids) => (float[batch, seq, {VOCABULARY}] logits)
<float[{VOCABULARY}, {WIDTH}] table> {{
  hidden = Gather(table, input_ids)
  turned = Transpose<perm = [1, 0]>(table)
  [head_node] logits = MatMul(hidden, turned)
}}"""

GEMM = f"""<ir_version: 10, opset_import: ["": 20]>
small (float[rows, {WIDTH}] x) => (float[rows, {INNER}] y)
<float[{INNER}, {WIDTH}] weight, float[{INNER}] bias> {{
  [gemm_node] y = Gemm<transB = 1>(x, weight, bias)
}}"""

TWO_ACTIVATIONS = f"""<ir_version: 10, opset_import: ["": 20]>
small (float[{WIDTH}, {WIDTH}] x) => (float[{WIDTH}, {WIDTH}] y) {{
  y = MatMul(x, x)
}}"""

RAGGED = f"""<ir_version: 10, opset_import: ["": 20]>
small (float[rows, 40] x) => (float[rows, {INNER}] y)
<float[40, {INNER}] weight> {{
  [ragged_node] y = MatMul(x, weight)
}}"""

OTHERS = f"""<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
small (float[2, {WIDTH}, {WIDTH}] x) => (float[2, {WIDTH}, {WIDTH}] y)
<float[2, {WIDTH}, {WIDTH}] experts, float[{WIDTH}, {WIDTH}] left, float[{WIDTH}, {WIDTH}] w,
 float[{WIDTH}, {WIDTH}] fused> {{
  [many] a = MatMul(x, experts)
  [first] b = MatMul(left, a)
  [with_factor] c = com.microsoft.FusedMatMul<alpha = 0.5>(b, fused)
  [without_weight] d = com.microsoft.FusedMatMul<alpha = 0.5>(b, c)
  [plain] y = MatMul(d, w)
}}"""


def written(text: str, path: Path, *, kind: ir.DataType = ir.DataType.FLOAT) -> Path:
    """Writes a graph with normal noise in its weights."""
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(0)
    for value in _weights(model):
        noise = rng.standard_normal(value.shape.numpy()) / 8  # type: ignore[union-attr]
        value.const_value = ir.tensor(noise.astype(kind.numpy()), name=value.name)
        model.graph.register_initializer(value)
    if kind != ir.DataType.FLOAT:
        for value in (
            *model.graph.inputs,
            *model.graph.outputs,
            *model.graph.initializers.values(),
        ):
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, path)
    return path


def _weights(model: ir.Model) -> list[ir.Value]:
    """Values that nothing computes and nobody gives, once each."""
    read = dict.fromkeys(v for node in model.graph for v in node.inputs if v is not None)
    return [v for v in read if v.producer() is None and not v.is_graph_input()]


def set_weight(path: Path, name: str, array: np.ndarray[Any, Any], target: Path) -> Path:
    """The same graph with other numbers in one weight."""
    from graph_passes.files.storage import load_model

    model = load_model(path)
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    save_model(model, target)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
