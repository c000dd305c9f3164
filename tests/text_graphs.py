"""Graphs written as text: a language model of a few kilobytes, weights that fill blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graph_passes.files.storage import save_model

HEADS, HEAD_DIM, HIDDEN = 2, 4, 8
WORDS = (
    *("the", "a", "and", "of", "in", "to", "is", "for", "on", "with"),
    *("value", "list", "string", "type", "class", "object", "call", "name", "if", "that"),
)


def write_tiny_lm(
    folder: Path,
    *,
    vocabulary: int = 32,
    layers: Sequence[int] = (0, 1),
    scale: float = 1.0,
    noise: float = 0.0,
    extra_input: str | None = None,
    output: str = "logits",
    plan: object = None,
    opset: int = 20,
) -> Path:
    """Writes ``model.onnx`` and its data; ``noise`` moves the weights of the head."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((vocabulary, HIDDEN)).astype(np.float32)
    head = rng.standard_normal((HIDDEN, vocabulary)).astype(np.float32) * np.float32(scale)
    head += np.random.default_rng(1).standard_normal(head.shape).astype(np.float32) * noise
    model = ir.from_onnx_text(_text(vocabulary, layers, extra_input, output, opset))
    for name, array in {"table": table, "head": head}.items():
        _fill(model, name, array)
    if plan is not None:
        model.metadata_props["depthcut.plan"] = json.dumps(plan)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """Writes a word-level ``tokenizer.json``, by default of 20 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {word: number for number, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def _text(
    vocabulary: int, layers: Sequence[int], extra: str | None, output: str, opset: int
) -> str:
    inputs = ["int64[batch, seq] input_ids"]
    outputs = [f"float[batch, seq, {vocabulary}] {output}"]
    if layers:
        inputs += ["int64[batch, total] attention_mask", "int64[batch, seq] position_ids"]
    if extra:
        inputs.append(f"int64[batch, seq] {extra}")
    nodes = [
        "hidden = Gather(table, input_ids)",
        f"{output} = MatMul(hidden, head)",
        f"heads_shape = Constant<value_ints = [0, -1, {HEADS}, {HEAD_DIM}]>()",
        "split = Reshape(hidden, heads_shape)",
        "new = Transpose<perm = [0, 2, 1, 3]>(split)",
    ]
    for layer in layers:
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            inputs.append(f'float[batch, {HEADS}, past, {HEAD_DIM}] "{past}"')
            outputs.append(f'float[batch, {HEADS}, total, {HEAD_DIM}] "{present}"')
            nodes.append(f'"{present}" = Concat<axis = 2>("{past}", new)')
    weights = f"float[{vocabulary}, {HIDDEN}] table, float[{HIDDEN}, {vocabulary}] head"
    return (
        f'<ir_version: 10, opset_import: ["": {opset}]>\n'
        f"tiny ({', '.join([*inputs, weights])}) => ({', '.join(outputs)}) {{\n"
        + "\n".join(nodes)
        + "\n}"
    )


def _fill(model: ir.Model, name: str, array: np.ndarray) -> None:
    """Turns a graph input into a weight: the text form can't hold one of this size."""
    value = next(value for value in model.graph.inputs if value.name == name)
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(array, name=name)
    model.graph.register_initializer(value)


def write_llama_folder(
    folder: Path, *, layers: int = 3, positions: int = 128, **changes: Any
) -> Path:
    """A Hugging Face folder with a random Llama and a word tokenizer; ``changes`` of its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    usual: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": positions,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**usual | changes)).save_pretrained(folder)
    write_tokenizer(folder)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


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
