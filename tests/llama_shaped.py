"""Decoders of any size whose weights take no time to make: the graph is whole, the data sparse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporter.export.forms.tensorrt import rewrite_decoder
from tests.tiny_graphs import GraphBuilder, declare, declared

_PIECE_BYTES = 64 << 20
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama; the defaults are those of Llama 2 70B, 138 GB in fp16."""

    layers: int = 80
    hidden: int = 8192
    heads: int = 64
    kv_heads: int = 8
    intermediate: int = 28672
    vocabulary: int = 32000
    cache: bool = True
    dtype: ir.DataType = ir.DataType.FLOAT16
    fused_norm: bool = False
    fused_attention: bool = False
    positions: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


def write_llama(
    path: Path, shape: LlamaShape, *, noise: float = 0.0, room: int | None = None
) -> Path:
    """Writes ``path`` and ``<path>.data``."""
    builder = _Builder(shape, f"{path.name}.data")
    model = builder.build()
    if room is not None:
        model, _, remark = rewrite_decoder(model, room)
        if remark:
            raise ValueError(remark)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(builder.location)
    with data.open("wb") as file:
        if noise:
            for piece in _noise(builder.size, shape.dtype, noise):
                file.write(piece)
        os.truncate(file.fileno(), builder.size)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def _noise(size: int, dtype: ir.DataType, scale: float) -> Iterator[bytes]:
    """Pieces of normal noise, the same few over and over, each time begun elsewhere."""
    rng = np.random.default_rng(0)
    count = int(min(_PIECE_BYTES, size) // dtype.itemsize) + 1
    noise = (rng.standard_normal(count) * scale).astype(dtype.numpy())
    while size > 0:
        piece = np.roll(noise, int(rng.integers(count))).tobytes()[:size]
        size -= len(piece)
        yield piece


class _Builder(GraphBuilder):
    def __init__(self, shape: LlamaShape, location: str) -> None:
        super().__init__()
        self.location = location
        self.size = 0
        self._shape = shape
        self._small: dict[tuple[str, str], ir.Value] = {}
        self._inputs = [declared("input_ids", ir.DataType.INT64, "batch", "seq")]

    def build(self) -> ir.Model:
        shape = self._shape
        ids = self._inputs[0]
        if shape.cache:
            mask = declared("attention_mask", ir.DataType.INT64, "batch", "total")
            self._inputs.append(mask)
            if shape.positions:
                self._inputs.append(declared("position_ids", ir.DataType.INT64, "batch", "seq"))
            self._pasts = [
                [self._past(layer, part) for part in ("key", "value")]
                for layer in range(shape.layers)
            ]
        self._bias = self._causal_bias()
        x = self._op("Gather", self._weight("embed", shape.vocabulary, shape.hidden), ids)
        for layer in range(shape.layers):
            x = self._op("Add", x, self._attention(self._norm(x), layer))
            x = self._op("Add", x, self._mlp(self._norm(x), layer))
        head = self._weight("head", shape.hidden, shape.vocabulary)
        logits = self._op("MatMul", self._norm(x), head)
        self._publish(logits, "logits", "batch", "seq", shape.vocabulary, dtype=self._shape.dtype)
        self._weights += self._small.values()
        opset = 23 if shape.fused_norm or shape.fused_attention else 20
        return self._model("llama", logits, default=opset)

    def _attention(self, x: ir.Value, layer: int) -> ir.Value:
        s = self._shape
        query = self._heads(x, f"{layer}.q", s.heads)
        key, value = (self._heads(x, f"{layer}.{name}", s.kv_heads) for name in "kv")
        query, key = self._rotated(query), self._rotated(key)
        declare(query, s.dtype, "batch", s.heads, "seq", s.head_dim)  # an exporter knows it
        if s.cache:
            past_key, past_value = self._pasts[layer]
            key = self._op("Concat", past_key, key, axis=2)
            value = self._op("Concat", past_value, value, axis=2)
            for cache, part in ((key, "key"), (value, "value")):
                name = f"present.{layer}.{part}"
                sizes = "batch", s.kv_heads, "total", s.head_dim
                self._publish(cache, name, *sizes, dtype=s.dtype)
                self._outputs.append(cache)
        joined = self._op("Transpose", self._attended(query, key, value), perm=[0, 2, 1, 3])
        flat = self._op("Reshape", joined, self._number(np.array([0, 0, s.hidden])))
        return self._op("MatMul", flat, self._weight(f"{layer}.o", s.hidden, s.hidden))

    def _attended(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        s = self._shape
        if s.fused_attention:
            return self._op("Attention", query, key, value, self._bias, scale=s.head_dim**-0.5)
        key, value = self._repeated(key), self._repeated(value)
        turned = self._op("Transpose", key, perm=[0, 1, 3, 2])
        scale = self._number(np.asarray(s.head_dim**-0.5, s.dtype.numpy()))
        scores = self._op("Mul", self._op("MatMul", query, turned), scale)
        weights = self._op("Softmax", self._op("Add", scores, self._bias), axis=-1)
        return self._op("MatMul", weights, value)

    def _heads(self, x: ir.Value, name: str, count: int) -> ir.Value:
        s = self._shape
        projected = self._op("MatMul", x, self._weight(name, s.hidden, count * s.head_dim))
        split = self._op("Reshape", projected, self._number(np.array([0, 0, count, s.head_dim])))
        return self._op("Transpose", split, perm=[0, 2, 1, 3])

    def _rotated(self, x: ir.Value) -> ir.Value:
        half = self._shape.head_dim // 2
        axis, begin = self._number(np.array([3])), self._number(np.array([0]))
        middle, end = self._number(np.array([half])), self._number(np.array([2 * half]))
        left = self._op("Slice", x, begin, middle, axis)
        right = self._op("Slice", x, middle, end, axis)
        turned = self._op("Concat", self._op("Neg", right), left, axis=-1)
        cos, sin = self._tables
        return self._op("Add", self._op("Mul", x, cos), self._op("Mul", turned, sin))

    def _repeated(self, x: ir.Value) -> ir.Value:
        s = self._shape
        groups = s.heads // s.kv_heads
        if groups == 1:
            return x
        wide = self._op("Unsqueeze", x, self._number(np.array([2])))
        ones = self._number(np.array([1, 1, groups, 1, 1]))
        wide = self._op("Expand", wide, ones)
        shape = self._number(np.array([0, s.heads, -1, s.head_dim]))
        return self._op("Reshape", wide, shape)

    def _mlp(self, x: ir.Value, layer: int) -> ir.Value:
        s = self._shape
        gate, up = (
            self._op("MatMul", x, self._weight(f"{layer}.{name}", s.hidden, s.intermediate))
            for name in ("gate", "up")
        )
        gated = self._op("Mul", self._op("Mul", gate, self._op("Sigmoid", gate)), up)
        return self._op("MatMul", gated, self._weight(f"{layer}.down", s.intermediate, s.hidden))

    def _norm(self, x: ir.Value) -> ir.Value:
        gain = self._weight(f"norm{len(self._nodes)}", self._shape.hidden)
        if self._shape.fused_norm:
            return self._op("RMSNormalization", x, gain, axis=-1)
        wide = self._op("Cast", x, to=ir.DataType.FLOAT.value)
        square = self._op("Pow", wide, self._number(np.float32(2)))
        mean = self._op("ReduceMean", square, self._number(np.array([-1])))
        root = self._op("Sqrt", self._op("Add", mean, self._number(np.float32(1e-5))))
        scaled = self._op("Div", wide, root)
        return self._op("Mul", self._op("Cast", scaled, to=self._shape.dtype.value), gain)

    def _causal_bias(self) -> ir.Value:
        """0 for what was before, far below 0 for what comes; rotary tables."""
        s = self._shape
        zero, one = self._number(np.int64(0)), self._number(np.int64(1))
        total = seq = self._length(self._inputs[0], 1)
        past = zero
        if s.cache:
            past = self._length(self._pasts[0][0], 2)
            total = self._op("Add", past, seq)
        columns = self._op("Range", zero, total, one)
        rows = self._op("Range", past, total, one)
        self._tables = self._rotary_tables(self._inputs[2] if s.positions else rows)
        seen = self._op(
            "LessOrEqual", columns, self._op("Unsqueeze", rows, self._number(np.array([1])))
        )
        if s.positions:
            value = self._op("Cast", self._inputs[1], to=ir.DataType.BOOL.value)
            value = self._op("Unsqueeze", value, self._number(np.array([1, 2])))
            seen = self._op("And", seen, value)
        low = self._number(np.asarray(-3e4, s.dtype.numpy()))
        return self._op("Where", seen, self._number(np.asarray(0, s.dtype.numpy())), low)

    def _rotary_tables(self, positions: ir.Value) -> list[ir.Value]:
        size = self._shape.head_dim
        speeds = 10000.0 ** (-np.arange(0, size, 2, dtype=np.float32) / size)
        axes = np.array([1, 3] if self._shape.positions else [1])  # [batch, 1, seq, 1] or [seq, 1]
        angles = self._op(
            "Mul",
            self._op("Cast", self._op("Unsqueeze", positions, self._number(axes)), to=1),
            self._number(np.concatenate([speeds, speeds])[None].astype(np.float32)),
        )
        kind = self._shape.dtype.value
        return [self._op("Cast", self._op(name, angles), to=kind) for name in ("Cos", "Sin")]

    def _past(self, layer: int, part: str) -> ir.Value:
        s = self._shape
        name = f"past_key_values.{layer}.{part}"
        value = declared(name, s.dtype, "batch", s.kv_heads, "past", s.head_dim)
        self._inputs.append(value)
        return value

    def _weight(self, name: str, *dims: int) -> ir.Value:
        value = declared(name, self._shape.dtype, *dims)
        length = int(np.prod(dims, dtype=np.int64)) * self._shape.dtype.numpy().itemsize
        self.size = -(-self.size // _PAGE_BYTES) * _PAGE_BYTES
        value.const_value = ir.ExternalTensor(
            self.location, self.size, length, self._shape.dtype, shape=ir.Shape(dims), name=name
        )
        self.size += length
        self._weights.append(value)
        return value

    def _number(self, data: np.ndarray | np.generic) -> ir.Value:
        array = np.asarray(data)
        key = (str(array.dtype), str(array.tolist()))
        if key not in self._small:
            name = f"c{len(self._small)}"
            tensor = ir.tensor(array, name=name)
            value = declared(name, tensor.dtype, *array.shape)
            value.const_value = tensor
            self._small[key] = value
        return self._small[key]
