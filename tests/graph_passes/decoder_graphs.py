"""Tiny decoders as PyTorch's exporter writes them at opset 23, with a cache that grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from tests.tiny_graphs import GraphBuilder, declare, declared, tiny_feed

HIDDEN, HEADS, KV_HEADS, SIZE, VOCABULARY, POSITIONS = 32, 4, 2, 32, 11, 32
_FAR_BELOW = float(np.finfo(np.float32).min)

CALLS: list[dict[str, int]] = [
    {"seq": 9}, {"seq": 9, "padding": 3}, {"seq": 1, "past": 6}, {"seq": 3, "past": 5, "batch": 1},
]  # fmt: skip
"""A prompt, one with padding, a step, and a few tokens at once."""


@dataclass(frozen=True)
class DecoderSpec:
    """What kind of decoder to build."""

    layers: int = 2
    rotary: Literal["operator", "half", "quarter", "halves", "pairs", "by_length", "none"] = (
        "operator"
    )
    norm: Literal["RMSNormalization", "LayerNormalization"] = "RMSNormalization"
    norm_bias: bool = True
    qk_norm: bool = False
    window: int | None = None
    softcap: float = 0.0
    softmax: bool = False
    mask: Literal["causal", "all", "alibi"] = "causal"
    repeats: Literal["each", "in_turn"] = "each"
    bias: bool = False
    projections: Literal["three", "one"] = "three"


def decoder_model(spec: DecoderSpec = DecoderSpec(), *, seed: int = 0) -> ir.Model:
    """Builds the model; weights are drawn from a seeded generator."""
    model = _Builder(spec, seed).build()
    ShapeInferencePass()(model)
    return model


def decoder_feed(
    model: ir.Model, *, seq: int, past: int = 0, batch: int = 2, padding: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs; the last row ends with padding."""
    seed = seq + past
    return tiny_feed(model, seq=seq, past=past, batch=batch, seed=seed, left=0, right=padding)


class _Builder(GraphBuilder):
    _scale = 0.3

    def __init__(self, spec: DecoderSpec, seed: int) -> None:
        super().__init__(seed)
        self._spec = spec
        tokens = (
            ("input_ids", "sequence"),
            ("attention_mask", "total"),
            ("position_ids", "sequence"),
        )
        self._ids, self._told, self._positions = self._inputs = [
            declared(name, ir.DataType.INT64, "batch", dim) for name, dim in tokens
        ]

    def build(self) -> ir.Model:
        x = self._op("Gather", self._weight(VOCABULARY, HIDDEN), self._ids)
        if self._spec.rotary == "none":
            x = self._op(
                "Add", x, self._op("Gather", self._weight(POSITIONS, HIDDEN), self._positions)
            )
        pasts = [
            [
                self._input(f"past_key_values.{n}.{part}", "batch", KV_HEADS, "past", SIZE)
                for part in ("key", "value")
            ]
            for n in range(self._spec.layers)
        ]
        self._past_length = self._length(pasts[-1][0], 2)
        mask = self._mask()
        self._tables = self._rotary_tables()
        for layer, pair in enumerate(pasts):
            x = self._op("Add", x, self._attention(self._norm(x, HIDDEN), pair, mask, layer))
            inner = self._op("Relu", self._project(self._norm(x, HIDDEN), 48))
            x = self._op("Add", x, self._project(inner, HIDDEN, 48))
        logits = self._op("MatMul", self._norm(x, HIDDEN), self._weight(HIDDEN, VOCABULARY))
        self._publish(logits, "logits", "batch", "sequence", VOCABULARY)
        return self._model("decoder", logits, default=23)

    def _attention(
        self, x: ir.Value, pasts: list[ir.Value], mask: ir.Value, layer: int
    ) -> ir.Value:
        query, key, value = self._projections(x)
        query, key = self._rotated(query), self._rotated(key)
        caches = [
            self._op("Concat", past, new, axis=-2)
            for past, new in zip(pasts, (key, value), strict=True)
        ]
        for cache, part in zip(caches, ("key", "value"), strict=True):
            self._output(cache, f"present.{layer}.{part}", "batch", KV_HEADS, "total", SIZE)
        keys, values = (self._repeated(cache) for cache in caches)
        result = self._attended(query, keys, values, mask)
        turned = self._op("Transpose", result, perm=[0, 2, 1, 3])
        flat = self._op("Reshape", turned, self._constant([0, 0, HEADS * SIZE]))
        return self._project(flat, HIDDEN, HEADS * SIZE)

    def _attended(
        self, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value
    ) -> ir.Value:
        cap = self._spec.softcap
        if not cap and not self._spec.softmax:
            return self._op("Attention", query, keys, values, mask, scale=0.3)
        if mask.dtype == ir.DataType.BOOL or self._spec.mask == "causal":
            mask = self._op("Where", mask, self._number(0.0), self._number(_FAR_BELOW))
        turned = self._op("Transpose", keys, perm=[0, 1, 3, 2])
        scores = self._op("Mul", self._op("MatMul", query, turned), self._number(0.3))
        if cap:
            scores = self._op("Tanh", self._op("Div", scores, self._number(cap)))
            scores = self._op("Mul", scores, self._number(cap))
        weights = self._op("Softmax", self._op("Add", scores, mask), axis=-1)
        return self._op("MatMul", weights, values)

    def _projections(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        heads = (HEADS, KV_HEADS, KV_HEADS)
        if self._spec.projections == "one":
            whole = self._project(x, sum(heads) * SIZE)
            sizes = self._constant([n * SIZE for n in heads])
            split = ir.Node("", "Split", [whole, sizes], [ir.AttrInt64("axis", -1)], num_outputs=3)
            self._nodes.append(split)
            parts = list(split.outputs)
        else:
            parts = [self._project(x, n * SIZE) for n in heads]
        query, key, value = (
            self._op("Reshape", part, self._constant([0, 0, n, SIZE]))
            for part, n in zip(parts, heads, strict=True)
        )
        if self._spec.qk_norm:
            query, key = self._norm(query, SIZE), self._norm(key, SIZE)
        turned = [self._op("Transpose", v, perm=[0, 2, 1, 3]) for v in (query, key, value)]
        return turned[0], turned[1], turned[2]

    def _repeated(self, cache: ir.Value) -> ir.Value:
        axis = 2 if self._spec.repeats == "each" else 1
        wide = self._op("Unsqueeze", cache, self._constant([axis]))
        sizes = [1, 1, 1, 1, 1]
        sizes[axis] = HEADS // KV_HEADS
        wide = self._op("Expand", wide, self._constant(sizes))
        made = self._op("Reshape", wide, self._constant([0, HEADS, -1, SIZE]))
        declare(made, ir.DataType.FLOAT, "batch", HEADS, "total", SIZE)  # an exporter knows it
        return made

    @property
    def _rotated_size(self) -> int:
        return SIZE // {"half": 2, "quarter": 4}.get(self._spec.rotary, 1)

    def _rotary_tables(self) -> tuple[ir.Value, ir.Value] | None:
        if self._spec.rotary == "none":
            return None
        pairs = self._rotated_size // 2
        speeds = self._initializer(100.0 ** -(np.arange(pairs, dtype=np.float32) / pairs))
        positions = self._op("Cast", self._positions, to=ir.DataType.FLOAT.value)
        if self._spec.rotary == "by_length":
            longest = self._op("ReduceMax", positions, keepdims=0)
            positions = self._op("Div", positions, self._op("Max", longest, self._number(4.0)))
        turns = self._op("Mul", self._op("Unsqueeze", positions, self._constant([2])), speeds)
        if self._spec.rotary == "halves":
            turns = self._op("Concat", turns, turns, axis=-1)
        cos, sin = self._op("Cos", turns), self._op("Sin", turns)
        if self._spec.rotary == "halves":
            one = self._constant([1])
            return self._op("Unsqueeze", cos, one), self._op("Unsqueeze", sin, one)
        return cos, sin

    def _rotated(self, x: ir.Value) -> ir.Value:
        if self._tables is None:
            return x
        cos, sin = self._tables
        if self._spec.rotary == "halves":
            low, high = self._part(x, 0, SIZE // 2), self._part(x, SIZE // 2, SIZE)
            turned = self._op("Concat", self._op("Neg", high), low, axis=-1)
            return self._op("Add", self._op("Mul", x, cos), self._op("Mul", turned, sin))
        size = self._rotated_size
        if size < SIZE:
            first = self._op("RotaryEmbedding", self._part(x, 0, size), cos, sin)
            return self._op("Concat", first, self._part(x, size, SIZE), axis=-1)
        return self._op(
            "RotaryEmbedding", x, cos, sin, interleaved=int(self._spec.rotary == "pairs")
        )

    def _part(self, x: ir.Value, start: int, stop: int) -> ir.Value:
        ends = [self._constant([n]) for n in (start, stop, 3, 1)]
        return self._op("Slice", x, *ends)

    def _mask(self) -> ir.Value:
        """True where a query may look, ``[batch, 1, sequence, total]``."""
        zero, one = self._constant(0), self._constant(1)
        total = self._op("Add", self._past_length, self._length(self._ids, 1))
        keys = self._op("Range", zero, total, one)
        rows = self._op("Range", self._past_length, total, one)
        rows = self._op("Unsqueeze", rows, self._constant([1]))
        seen = self._op("LessOrEqual", keys, rows)
        if self._spec.mask == "all":
            seen = self._op("LessOrEqual", keys, total)
        if self._spec.window is not None:
            first = self._op("Sub", rows, self._constant(self._spec.window))
            seen = self._op("And", seen, self._op("Greater", keys, first))
        value = self._op("Cast", self._told, to=ir.DataType.BOOL.value)
        value = self._op("Unsqueeze", value, self._constant([1, 2]))
        seen = self._op("And", seen, value)
        declare(seen, ir.DataType.BOOL, "batch", 1, "sequence", "total")
        if self._spec.mask != "alibi":
            return seen
        slope = self._op("Mul", self._op("Cast", keys, to=1), self._number(0.1))
        return self._op("Where", seen, slope, self._number(_FAR_BELOW))

    def _project(self, x: ir.Value, width: int, source: int = HIDDEN) -> ir.Value:
        made = self._op("MatMul", x, self._weight(source, width))
        return self._op("Add", made, self._weight(width)) if self._spec.bias else made

    def _norm(self, x: ir.Value, width: int) -> ir.Value:
        weights = [self._weight(width) for _ in range(1 + self._two_weights)]
        return self._op(self._spec.norm, x, *weights, axis=-1, epsilon=1e-6)

    @property
    def _two_weights(self) -> bool:
        return self._spec.norm == "LayerNormalization" and self._spec.norm_bias
