"""Tiny Transformers in the operators that ONNX Runtime's builder and optimisers emit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from tests.tiny_graphs import GraphBuilder, declared

HIDDEN, HEADS, HEAD_DIM, VOCABULARY, INNER = 32, 2, 16, 11, 48
_BLOCK, _MAX_POSITIONS = 16, 16

Form = Literal["genai", "gpt2", "bert"]


@dataclass(frozen=True)
class FusedSpec:
    """What kind of fused graph to build."""

    form: Form = "genai"
    layers: int = 2
    rms: bool = True
    bias: bool = False
    skip_first: bool = True
    multi_head: bool = False
    int4: bool = False
    sums: bool = False
    parallel: bool = False


FUSED = {
    "genai": FusedSpec(),
    "genai_bias": FusedSpec(bias=True, skip_first=False),
    "genai_layer_norm": FusedSpec(rms=False),
    "genai_layer_norm_bias": FusedSpec(rms=False, bias=True),
    "genai_int4": FusedSpec(int4=True),
    "genai_sums": FusedSpec(sums=True, bias=True),
    "genai_parallel": FusedSpec(parallel=True),
    "gpt2": FusedSpec(form="gpt2", bias=True, skip_first=False),
    "gpt2_no_bias": FusedSpec(form="gpt2"),
    "bert": FusedSpec(form="bert", bias=True, skip_first=False),
    "bert_no_bias": FusedSpec(form="bert"),
    "bert_multi_head": FusedSpec(form="bert", multi_head=True, bias=True),
}


def fused_model(spec: FusedSpec, *, seed: int = 0) -> ir.Model:
    """Builds the model; weights are drawn from a seeded generator."""
    return _Builder(spec, seed).build()


class _Builder(GraphBuilder):
    _scale = 0.2

    def __init__(self, spec: FusedSpec, seed: int) -> None:
        super().__init__(seed)
        self._spec = spec
        self._inputs = [
            declared("input_ids", ir.DataType.INT32, "batch", "seq"),
            declared("attention_mask", ir.DataType.INT32, "batch", "total"),
        ]

    def build(self) -> ir.Model:
        stream, normed = self._embed()
        for layer in range(self._spec.layers):
            if self._spec.parallel:
                both = self._op("Add", self._attention(normed, layer), self._mlp(normed))
                stream, normed = self._join(stream, both)
                continue
            stream, normed = self._join(stream, self._attention(normed, layer))
            if self._spec.sums and layer == 0:
                self._output(stream, "hidden_states", "batch", "seq", HIDDEN)
            stream, normed = self._join(stream, self._mlp(normed))
        logits = self._op("MatMul", normed, self._weight(HIDDEN, VOCABULARY))
        self._publish(logits, "logits", "batch", "seq", VOCABULARY)
        return self._model("fused", logits, default=21, com_microsoft=1)

    def _embed(self) -> tuple[ir.Value, ir.Value]:
        """The stream, and what the first sublayer reads: its norm, or for BERT the same."""
        ids, mask = self._inputs
        table = self._weight(VOCABULARY, HIDDEN)
        if self._spec.form == "genai":
            stream = self._op("Gather", table, ids)
            norm = "SimplifiedLayerNormalization" if self._spec.rms else "LayerNormalization"
            normed = self._op(norm, stream, *self._norm_weights(), axis=-1, epsilon=1e-5)
            self._lengths = self._sequence_lengths(mask)
            return stream, normed
        positions = self._weight(_MAX_POSITIONS, HIDDEN)
        bert = self._spec.form == "bert"
        operands = [ids, None, table, positions, None, *self._norm_weights()]
        outputs = self._ms(
            "EmbedLayerNormalization", [*operands, mask] if bert else operands, 2 if bert else 3
        )
        self._mask = outputs[1] if bert else mask
        return outputs[0 if bert else 2], outputs[0]

    def _sequence_lengths(self, mask: ir.Value) -> list[ir.Value]:
        """Each sequence's last position, and the total length, as GroupQueryAttention asks."""
        axis, one = self._constant(np.array([1])), self._constant(np.array([1], np.int32))
        last = self._op("Sub", self._op("ReduceSum", mask, axis, keepdims=0), one)
        total = self._op("Squeeze", self._op("Shape", mask, start=1, end=2))
        return [last, self._op("Cast", total, to=ir.DataType.INT32.value)]

    def _join(self, stream: ir.Value, branch: ir.Value) -> tuple[ir.Value, ir.Value]:
        spec = self._spec
        operands = [stream, branch] if spec.skip_first else [branch, stream]
        rms = spec.form == "genai" and spec.rms
        op_type = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
        bias = [self._weight(HIDDEN)] if spec.bias else []
        count = 1 if spec.form == "bert" else 4
        outputs = self._ms(op_type, [*operands, *self._norm_weights(), *bias], count, epsilon=1e-5)
        return (outputs[0], outputs[0]) if count == 1 else (outputs[3], outputs[0])

    def _norm_weights(self) -> list[ir.Value]:
        rms = self._spec.form == "genai" and self._spec.rms
        return [self._weight(HIDDEN) for _ in range(1 if rms else 2)]

    def _attention(self, x: ir.Value, layer: int) -> ir.Value:
        if self._spec.form == "genai":
            context = self._group_query(x, layer)
        elif self._spec.multi_head:
            heads = [self._project(x, HIDDEN) for _ in range(3)]
            operands = [*heads, self._weight(3 * HIDDEN), self._mask]
            (context,) = self._ms("MultiHeadAttention", operands, 1, num_heads=HEADS)
        else:
            context = self._packed(x, layer)
        return self._project(context, HIDDEN)

    def _group_query(self, x: ir.Value, layer: int) -> ir.Value:
        query, key, value = (self._project(x, HIDDEN) for _ in range(3))
        query.shape = ir.Shape(["batch", "seq", HIDDEN])
        query.type = ir.TensorType(ir.DataType.FLOAT)
        pasts = [
            self._input(f"past_key_values.{layer}.{part}", "batch", HEADS, "past", "kv_cache_dim")
            for part in ("key", "value")
        ]
        operands = [query, key, value, *pasts, *self._lengths]
        context, *presents = self._ms(
            "GroupQueryAttention", operands, 3, num_heads=HEADS, kv_num_heads=HEADS
        )
        for present, part in zip(presents, ("key", "value"), strict=True):
            name = f"present.{layer}.{part}"
            self._output(present, name, "batch", HEADS, "total", "kv_cache_dim")
        return context

    def _packed(self, x: ir.Value, layer: int) -> ir.Value:
        operands = [x, self._weight(HIDDEN, 3 * HIDDEN), self._weight(3 * HIDDEN), self._mask]
        if self._spec.form == "bert":
            return self._ms("Attention", operands, 1, num_heads=HEADS)[0]
        operands.append(self._input(f"past_{layer}", 2, "batch", HEADS, "past", HEAD_DIM))
        context, present = self._ms("Attention", operands, 2, num_heads=HEADS, unidirectional=1)
        self._output(present, f"present_{layer}", 2, "batch", HEADS, "total", HEAD_DIM)
        return context

    def _mlp(self, x: ir.Value) -> ir.Value:
        return self._project(self._op("Relu", self._project(x, INNER)), HIDDEN)

    def _project(self, x: ir.Value, size: int) -> ir.Value:
        width = INNER if x.producer().op_type == "Relu" else HIDDEN  # type: ignore[union-attr]
        if not self._spec.int4:
            return self._op("MatMul", x, self._weight(width, size))
        blocks = width // _BLOCK
        packed = self._rng.integers(0, 256, (size, blocks, _BLOCK // 2)).astype(np.uint8)
        operands = [x, self._constant(packed), self._weight(size * blocks, scale=0.05)]
        return self._ms(
            "MatMulNBits", operands, 1, K=width, N=size, bits=4, block_size=_BLOCK
        )[0]  # fmt: skip

    def _ms(
        self, op_type: str, inputs: list[Any], outputs: int, **attributes: Any
    ) -> list[ir.Value]:
        node = ir.node(
            op_type, inputs, attributes or None, domain="com.microsoft", num_outputs=outputs
        )
        made = list(self._add(node))
        if op_type.startswith("Skip"):
            for value in made[1:3]:
                value.name = ""
        return made
