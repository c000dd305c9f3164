"""Tiny Transformers as ONNX graphs, in every form that a test needs; built in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from graph_passes import save_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass

Form = Literal[
    "pre_norm",
    "post_norm",
    "sandwich",
    "norm_after",
    "multiplier",
    "parallel",
    "parallel_in_turn",
    "split_mlp",
]

HIDDEN, HEADS, HEAD_DIM, VOCABULARY, INNER = 8, 2, 4, 11, 16
_FAR_BELOW = -1e9


@dataclass(frozen=True)
class TinySpec:
    """What kind of Transformer to build."""

    form: Form = "pre_norm"
    layers: int = 3
    cache: bool = True
    past_from: int = 0
    gather_past: bool = False
    fused: bool = False
    tied: bool = False
    router: bool = False
    mask_in_branch: bool = False
    annotated: bool = True


def tiny_model(spec: TinySpec = TinySpec(), *, seed: int = 0) -> ir.Model:
    """Builds the model; weights are drawn from a seeded generator."""
    model = _Builder(spec, seed).build()
    if spec.annotated:
        ShapeInferencePass()(model)
    return model


def tiny_feed(
    model: ir.Model,
    *,
    seq: int,
    past: int = 0,
    batch: int = 2,
    seed: int = 0,
    left: int = 1,
    right: int = 0,
) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs of the declared sizes; some first or last positions of one row are padding."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "seq": seq, "sequence": seq, "total": past + seq, "source": 5}
    sizes["kv_cache_dim"] = 16  # as ONNX Runtime's builder calls the size of a head
    feed: dict[str, np.ndarray[Any, Any]] = {}
    for value in (value for value in model.graph.inputs if not value.is_initializer()):
        name = value.name or ""
        assert value.dtype is not None
        dtype = value.dtype.numpy()
        if name == "attention_mask":
            mask = np.ones((batch, past + seq), dtype)
            mask[0, : min(left, past + seq - 1)] = 0
            mask[-1, past + seq - right :] = 0
            feed[name] = mask
        elif name == "position_ids":
            feed[name] = np.tile(np.arange(past, past + seq), (batch, 1))
        elif name == "input_ids":
            feed[name] = rng.integers(0, VOCABULARY, (batch, seq)).astype(dtype)
        else:
            dims = value.shape or ("batch", HEADS, past, HEAD_DIM)
            shape = [n if isinstance(n, int) else sizes.get(str(n), past) for n in dims]
            feed[name] = rng.standard_normal(shape).astype(dtype)
    return feed


class GraphBuilder:
    """Collects the nodes, weights and ends of a graph."""

    _scale = 1.0
    """Of the weights."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._nodes: list[ir.Node] = []
        self._weights: list[ir.Value] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def _model(self, name: str, logits: ir.Value, **opsets: int) -> ir.Model:
        """The graph; ``default`` is the opset of ONNX's own operators."""
        imports = {domain.replace("_", "."): version for domain, version in opsets.items()}
        imports[""] = imports.pop("default")
        graph = ir.Graph(
            self._inputs,
            [logits, *self._outputs],
            nodes=self._nodes,
            initializers=self._weights,
            opset_imports=imports,
            name=name,
        )
        return ir.Model(graph, ir_version=10, producer_name="depthcut tests")

    def _length(self, value: ir.Value, axis: int) -> ir.Value:
        return self._op("Squeeze", self._op("Shape", value, start=axis, end=axis + 1))

    def _publish(
        self, value: ir.Value, name: str, *dims: int | str, dtype: ir.DataType = ir.DataType.FLOAT
    ) -> None:
        value.name = name
        declare(value, dtype, *dims)

    def _input(self, name: str, *dims: int | str) -> ir.Value:
        value = declared(name, ir.DataType.FLOAT, *dims)
        self._inputs.append(value)
        return value

    def _output(self, value: ir.Value, name: str, *dims: int | str) -> None:
        self._publish(value, name, *dims)
        self._outputs.append(value)

    def _weight(self, *shape: int, scale: float | None = None) -> ir.Value:
        data = self._rng.standard_normal(shape) * (self._scale if scale is None else scale)
        return self._initializer(data.astype(np.float32))

    def _constant(self, data: Any) -> ir.Value:
        return self._initializer(np.asarray(data))

    def _number(self, data: float) -> ir.Value:
        return self._initializer(np.array(data, np.float32))

    def _initializer(self, data: np.ndarray[Any, Any]) -> ir.Value:
        name = f"w{len(self._weights)}"
        tensor = ir.tensor(data, name=name)
        value = declared(name, tensor.dtype, *data.shape)
        value.const_value = tensor
        self._weights.append(value)
        return value

    def _op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self._add(ir.node(op_type, list(inputs), attributes or None))[0]

    def _add(self, node: ir.Node) -> Sequence[ir.Value]:
        number = len(self._nodes)
        node.name = f"n{number}"
        for place, value in enumerate(node.outputs):
            value.name = f"v{number}.{place}" if place else f"v{number}"
        self._nodes.append(node)
        return node.outputs


def declare(value: ir.Value, dtype: ir.DataType, *dims: int | str) -> None:
    """Gives a value a type and a shape."""
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(dims)


def declared(name: str, dtype: ir.DataType, *dims: int | str) -> ir.Value:
    """A new value with a type and a shape."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


class _Builder(GraphBuilder):
    def __init__(self, spec: TinySpec, seed: int) -> None:
        super().__init__(seed)
        self._spec = spec
        self._inputs = [
            declared("input_ids", ir.DataType.INT64, "batch", "seq"),
            declared("attention_mask", ir.DataType.INT64, "batch", "total"),
        ]
        self._pasts: list[tuple[ir.Value, ir.Value]] = []
        if spec.cache:
            for layer in range(spec.layers):
                self._pasts.append((self._past(layer, "key"), self._past(layer, "value")))

    def build(self) -> ir.Model:
        embedding = self._weight(VOCABULARY, HIDDEN)
        x = self._op("Gather", embedding, self._inputs[0])
        if not self._spec.mask_in_branch:
            self._bias = self._mask_bias(self._length(self._inputs[0], 1))
        for layer in range(self._spec.layers):
            x = self._layer(x, layer)
        table = self._op("Transpose", embedding) if self._spec.tied else None
        head = table if table is not None else self._weight(HIDDEN, VOCABULARY)
        logits = self._op("MatMul", self._norm(x), head)
        self._publish(logits, "logits", "batch", "seq", VOCABULARY)
        return self._model("tiny", logits, default=23 if self._spec.fused else 18)

    def _layer(self, x: ir.Value, layer: int) -> ir.Value:
        form = self._spec.form
        if form in ("parallel", "parallel_in_turn"):
            return self._parallel_layer(x, layer)
        for make in (self._attention, self._mlp):
            parts = make(x if form in ("post_norm", "norm_after") else self._norm(x), layer)
            if form in ("sandwich", "norm_after"):
                parts = [self._norm(part) for part in parts]
            elif form == "multiplier":
                parts = [self._op("Mul", part, self._constant(np.float32(0.22))) for part in parts]
            x = self._op("Add", x, self._sum(parts))
            if form == "post_norm":
                x = self._norm(x)
        return x

    def _parallel_layer(self, x: ir.Value, layer: int) -> ir.Value:
        normed = self._norm(x)
        (attention,), (mlp,) = self._attention(normed, layer), self._mlp(normed, layer)
        if self._spec.form == "parallel":
            return self._op("Add", self._op("Add", attention, mlp), x)
        return self._op("Add", self._op("Add", x, attention), mlp)

    def _sum(self, parts: Sequence[ir.Value]) -> ir.Value:
        return parts[0] if len(parts) == 1 else self._op("Add", *parts)

    def _mlp(self, x: ir.Value, layer: int) -> list[ir.Value]:
        parts = 2 if self._spec.form == "split_mlp" else 1
        made = []
        for _ in range(parts):
            inner = self._op("Relu", self._op("MatMul", x, self._weight(HIDDEN, INNER)))
            made.append(self._op("MatMul", inner, self._weight(INNER, HIDDEN)))
        if self._spec.router and layer == 0:
            scores = self._op("MatMul", x, self._weight(HIDDEN, 1))
            made[0] = self._op("Mul", made[0], self._op("Softmax", scores, axis=1))
        return made

    def _attention(self, x: ir.Value, layer: int) -> list[ir.Value]:
        query, key, value = (self._heads(x) for _ in range(3))
        if self._spec.mask_in_branch and layer == 0:
            self._bias = self._mask_bias(self._length(query, 2))
        if self._spec.fused:
            context = self._fused_attention(query, key, value, layer)
        else:
            context = self._plain_attention(query, key, value, layer)
        joined = self._op("Transpose", context, perm=[0, 2, 1, 3])
        flat = self._op("Reshape", joined, self._constant(np.array([0, 0, HIDDEN])))
        return [self._op("MatMul", flat, self._weight(HIDDEN, HIDDEN))]

    def _plain_attention(
        self, query: ir.Value, key: ir.Value, value: ir.Value, layer: int
    ) -> ir.Value:
        if self._spec.cache:
            key, value = (
                self._op("Concat", past, new, axis=2)
                for past, new in zip(self._pasts[layer], (key, value), strict=True)
            )
            self._publish_caches(key, value, layer)
        turned = self._op("Transpose", key, perm=[0, 1, 3, 2])
        scores = self._op("Mul", self._op("MatMul", query, turned), self._constant(np.float32(0.5)))
        weights = self._op("Softmax", self._op("Add", scores, self._bias), axis=-1)
        return self._op("MatMul", weights, value)

    def _fused_attention(
        self, query: ir.Value, key: ir.Value, value: ir.Value, layer: int
    ) -> ir.Value:
        pasts = self._pasts[layer] if self._spec.cache else ()
        node = ir.Node(
            "", "Attention", [query, key, value, self._bias, *pasts], num_outputs=3 if pasts else 1
        )
        self._nodes.append(node)
        if pasts:
            self._publish_caches(node.outputs[1], node.outputs[2], layer)
        return node.outputs[0]

    def _mask_bias(self, seq: ir.Value) -> ir.Value:
        """[batch, 1, 1 or seq, total]: 0 where attention may look, far below 0 elsewhere."""
        mask = self._op("Cast", self._inputs[1], to=ir.DataType.FLOAT.value)
        lacking = self._op("Sub", self._constant(np.float32(1)), mask)
        padding = self._op("Mul", lacking, self._constant(np.float32(_FAR_BELOW)))
        padding = self._op("Unsqueeze", padding, self._constant(np.array([1, 2])))
        if not self._spec.cache:
            return padding
        past = self._past_length()
        total, zero, one = self._op("Add", past, seq), np.int64(0), np.int64(1)
        columns = self._op("Range", self._constant(zero), total, self._constant(one))
        rows = self._op("Range", past, total, self._constant(one))
        rows = self._op("Unsqueeze", rows, self._constant(np.array([1])))
        seen = self._op("LessOrEqual", columns, rows)
        nothing, much = (self._constant(np.float32(n)) for n in (0, _FAR_BELOW))
        return self._op("Add", padding, self._op("Where", seen, nothing, much))

    def _past_length(self) -> ir.Value:
        key = self._pasts[self._spec.past_from][0]
        if not self._spec.gather_past:
            return self._length(key, 2)
        return self._op("Gather", self._op("Shape", key), self._constant(np.int64(2)))

    def _heads(self, x: ir.Value) -> ir.Value:
        projected = self._op("MatMul", x, self._weight(HIDDEN, HIDDEN))
        size = self._constant(np.array([0, 0, HEADS, HEAD_DIM]))
        return self._op("Transpose", self._op("Reshape", projected, size), perm=[0, 2, 1, 3])

    def _norm(self, x: ir.Value) -> ir.Value:
        return self._op("LayerNormalization", x, self._weight(HIDDEN), self._weight(HIDDEN))

    def _past(self, layer: int, part: str) -> ir.Value:
        return self._input(f"past_key_values.{layer}.{part}", "batch", HEADS, "past", HEAD_DIM)

    def _publish_caches(self, key: ir.Value, value: ir.Value, layer: int) -> None:
        for cache, part in ((key, "key"), (value, "value")):
            self._output(cache, f"present.{layer}.{part}", "batch", HEADS, "total", HEAD_DIM)


_ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
attention (
    int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
    {dtype}[batch, {heads}, sequence, {size}] query,
    {dtype}[batch, {kv_heads}, sequence, {size}] key,
    {dtype}[batch, {kv_heads}, sequence, {size}] value,
    {dtype}[batch, {kv_heads}, past, {size}] past_key,
    {dtype}[batch, {kv_heads}, past, {size}] past_value
) => (
    {dtype}[batch, {heads}, sequence, {size}] found,
    {dtype}[batch, {kv_heads}, total, {size}] present_key,
    {dtype}[batch, {kv_heads}, total, {size}] present_value
)
<bool[batch, 1, sequence, total] seen>
{{
    present_key = Concat <axis = -2> (past_key, key)
    present_value = Concat <axis = -2> (past_value, value)
    rank = Constant <value_ints = [1]> ()
    ranks = Constant <value_ints = [1, 2]> ()
    one = Constant <value_int = 1> ()
    zero = Constant <value_int = 0> ()
    pasts = Shape <start = 2, end = 3> (past_key)
    past_length = Squeeze (pasts)
    news = Shape <start = 1, end = 2> (input_ids)
    new = Squeeze (news)
    whole = Add (past_length, new)
    columns = Range (zero, whole, one)
    places = Range (past_length, whole, one)
    rows = Unsqueeze (places, rank)
    earlier = LessOrEqual (columns, rows)
    real = Cast <to = 9> (attention_mask)
    told = Unsqueeze (real, ranks)
    seen = And (earlier, told)
    found = Attention <scale = 0.1> (query, present_key, present_value, seen)
}}
"""
_NAMES = {
    f"{when}_{what}": f"{full}.0.{what}"
    for when, full in (("past", "past_key_values"), ("present", "present"))
    for what in ("key", "value")
}


def attention_in_place(dtype: str, *, heads: int, kv_heads: int, size: int, room: int) -> ir.Model:
    """The graph, its caches in place."""
    text = _ATTENTION.format(dtype=dtype, heads=heads, kv_heads=kv_heads, size=size)
    model = ir.from_onnx_text(text)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = _NAMES.get(value.name or "", value.name)
    CacheInPlacePass(room)(model)
    return model


def saved(model: ir.Model, folder: Path, name: str = "model.onnx") -> Path:
    """The file of a model, written into a folder."""
    save_model(model, folder / name)
    return folder / name


def check_clean(model: ir.Model, path: Path | None = None) -> None:
    """Passes onnx's full check, and holds nothing that nothing needs."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto if path is None else str(path), full_check=True)
    check_tidy(model)


def check_tidy(model: ir.Model) -> None:
    """Holds nothing that nothing needs, and no name twice; the operators may be anyone's."""
    proto = ir.to_proto(model)
    outputs = {value.name for value in model.graph.outputs}
    for node in model.graph:
        assert any(v.uses() or v.name in outputs for v in node.outputs), f"{node.name} is dead"
    for value in model.graph.initializers.values():
        assert value.uses(), f"the weight {value.name} is dead"
    names = [name for node in proto.graph.node for name in node.output if name]
    names += [tensor.name for tensor in proto.graph.initializer]
    given = set(names)
    assert len(given) == len(names)
    assert {info.name for info in proto.graph.value_info} <= given
