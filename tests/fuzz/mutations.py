"""Ways to spoil a graph: each changes a ModelProto in place; most leave something that runs."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

Mutation = Callable[[ModelProto, random.Random], None]
MUTATIONS: dict[str, Mutation] = {}

_SWAPS = (
    ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"),
    ("Relu", "Sigmoid", "Tanh", "Identity", "Neg", "Abs", "Softmax", "Gelu", "Erf", "Sqrt"),
    ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
    ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    ("MatMul", "Gemm", "Einsum", "Add", "Mul"),
    ("ReduceMean", "ReduceMax", "ReduceSum", "Shape", "Size", "CumSum"),
    ("Reshape", "Expand", "Tile", "Unsqueeze"),
    ("Gather", "GatherElements", "GatherND"),
    ("Attention", "MultiHeadAttention", "GroupQueryAttention"),
)
_UNARY = ("Identity", "Neg", "Relu", "Sigmoid", "Tanh", "Softmax", "Dropout", "Abs", "Erf")
_NAMES = ("", "x", "past_key_values.0.key", "present.0.key", "layers.0", "é", "a" * 300, "0")
_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64,
          TensorProto.INT32, TensorProto.BOOL, TensorProto.BFLOAT16,
          TensorProto.STRING)  # fmt: skip
_PLANS = (
    "", "{}", "[1]", "null", '[{"layer": 0, "kind": "mlp", "replacement": "none"}]',
    '[{"layer": 1e999, "kind": "mlp"}]', '[{"layer": -3, "kind": "attention"}]', "[" * 2000,
    '[{"layer": 1, "kind": "attention", "replacement": "none"}]',
)  # fmt: skip


def mutation(function: Mutation) -> Mutation:
    """Adds a mutation to the list, under its own name."""
    MUTATIONS[function.__name__] = function
    return function


def value_names(graph: GraphProto) -> list[str]:
    """Everything that a node could read."""
    names = [value.name for value in graph.input]
    names += [tensor.name for tensor in graph.initializer]
    names += [name for node in graph.node for name in node.output if name]
    return list(dict.fromkeys(names))


def _fresh(graph: GraphProto, hint: str) -> str:
    """A name that the graph doesn't have yet."""
    taken = {*value_names(graph), *(node.name for node in graph.node)}
    return next(name for i in range(len(taken) + 1) if (name := f"{hint}_{i}") not in taken)


def _value(model: ModelProto, rng: random.Random) -> str:
    """Any value; more often than not one of the sums, where the sublayers join."""
    sums = [node.output[0] for node in model.graph.node if node.op_type in ("Add", "Sum")]
    return rng.choice(sums if sums and rng.random() < 0.6 else value_names(model.graph))


def _edges(model: ModelProto, name: str) -> list[tuple[NodeProto, int]]:
    return [(node, slot) for node in model.graph.node for slot, read in enumerate(node.input) if
    read == name]  # fmt: skip


def _insert(model: ModelProto, after: list[str], *nodes: NodeProto) -> None:
    """Puts nodes right behind the last one that gives one of some values."""
    given = [n + 1 for n, node in enumerate(model.graph.node) if {*after} & {*node.output}]
    for offset, node in enumerate(nodes, start=max(given, default=0)):
        model.graph.node.insert(offset, node)


def _made(model: ModelProto, op_type: str, *inputs: str, **attributes: int) -> NodeProto:
    name = f"{_fresh(model.graph, f'made_{op_type}')}/{inputs[0]}"
    node = NodeProto(op_type=op_type, name=name, input=inputs, output=[f"{name}_out"])
    for key, number in attributes.items():
        node.attribute.add(name=key, type=AttributeProto.INT, i=number)
    return node


def _constant(model: ModelProto, data: object) -> str:
    name = _fresh(model.graph, "made_constant")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    return name


@mutation
def rewire(model: ModelProto, rng: random.Random) -> None:
    """A node reads what stands before it, behind it, nowhere, or what its like reads."""
    nodes = model.graph.node
    index = rng.randrange(len(nodes))
    node = nodes[index]
    if not node.input:
        return
    slot = rng.randrange(len(node.input))
    before = [name for earlier in nodes[:index] for name in earlier.output if name]
    alike = [n.input[slot] for n in nodes if n.op_type == node.op_type and len(n.input) > slot]
    behind = [name for later in nodes[index:] for name in later.output]
    anything = value_names(model.graph)
    groups = [before, before, alike, alike, node.input, behind, anything, ["", "nowhere"]]
    node.input[slot] = rng.choice(rng.choice(groups) or anything)


@mutation
def drop_node(model: ModelProto, rng: random.Random) -> None:
    """A node goes; its readers read its first operand, or nothing that exists."""
    node = rng.choice(model.graph.node)
    if node.input and rng.random() < 0.8:
        for reader, slot in [edge for name in node.output for edge in _edges(model, name)]:
            reader.input[slot] = node.input[0]
    model.graph.node.remove(node)


@mutation
def duplicate_node(model: ModelProto, rng: random.Random) -> None:
    """A second copy computes the same; some of the first one's readers read it instead."""
    node = rng.choice(model.graph.node)
    if not node.output:
        return
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = _fresh(model.graph, "copied")
    for i, name in enumerate(node.output):
        copy.output[i] = _fresh(model.graph, f"copied_out{i}") if name else ""
    edges = _edges(model, node.output[0])
    for reader, slot in rng.sample(edges, rng.randrange(len(edges) + 1)):
        reader.input[slot] = copy.output[0]
    _insert(model, [node.output[0]], copy)


@mutation
def swap_operator(model: ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    groups = [group for group in _SWAPS if node.op_type in group]
    node.op_type = rng.choice(rng.choice(groups or _SWAPS))


@mutation
def publish(model: ModelProto, rng: random.Random) -> None:
    """A value, such as the stream, becomes a graph output, at any place among them."""
    output = onnx.ValueInfoProto(name=_value(model, rng))
    known = [info for info in model.graph.value_info if info.name == output.name]
    if known:
        output.CopyFrom(known[0])
    else:
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    model.graph.output.insert(rng.randrange(len(model.graph.output) + 1), output)


def _scaled(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    shape = rng.choice([(), (1,), (8,), (1, 1, 1), (1, 1, 8), (2, 1, 1), (1, 2, 1, 1, 1)])
    operands = [name, _constant(model, np.full(shape, 0.5, np.float32))]
    rng.shuffle(operands)
    return [_made(model, rng.choice(("Add", "Mul", "Sub", "Div")), *operands)]


def _broadcast(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    axes = _constant(model, np.array([rng.choice((0, 1, 2, -1))], np.int64))
    return [_made(model, rng.choice(("ReduceMean", "ReduceSum")), name, axes, keepdims=1)]


def _cast(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    there = _made(model, "Cast", name, to=rng.choice(_TYPES))
    back = _made(model, "Cast", there.output[0], to=TensorProto.FLOAT)
    return [there, back] if rng.random() < 0.8 else [there]


def _split(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    axis = rng.choice((0, 1, 2, -1))
    split = _made(model, "Split", name, axis=axis, num_outputs=2)
    split.output.append(f"{split.output[0]}_second")
    return [split, _made(model, "Concat", *rng.sample([*split.output], 2), axis=axis)]


def _measured(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    shape = _made(model, "Shape", name)
    cast = _made(model, "Cast", shape.output[0], to=TensorProto.FLOAT)
    return [shape, cast, _made(model, "ReduceMean", cast.output[0], keepdims=0)]


def _unary(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    return [_made(model, rng.choice(_UNARY), name)]


def _reduced(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    return [_made(model, rng.choice(("ReduceMean", "ReduceMax")), name, keepdims=1)]


def _turned(model: ModelProto, name: str, rng: random.Random) -> list[NodeProto]:
    return [_made(model, "MatMul", name, _constant(model, np.eye(8, dtype=np.float32)))]


@mutation
def insert(model: ModelProto, rng: random.Random) -> None:
    """Something stands on one edge, or on all that lead away from a value."""
    name = _value(model, rng)
    edges = _edges(model, name)
    nodes = rng.choice((_unary, _scaled, _broadcast, _cast, _split))(model, name, rng)
    for edge, slot in edges[: rng.choice((1, 99))]:
        edge.input[slot] = nodes[-1].output[0]
    _insert(model, [name], *nodes)


@mutation
def join(model: ModelProto, rng: random.Random) -> None:
    """What is made of a value runs along beside the stream, and joins another value."""
    later = [node.output[0] for node in model.graph.node if node.op_type in ("Add", "MatMul")]
    name, target = _value(model, rng), rng.choice(later or value_names(model.graph))
    edges = _edges(model, target)
    nodes = rng.choice((_unary, _reduced, _measured, _turned))(model, name, rng)
    total = _made(model, "Add", target, nodes[-1].output[0])
    for edge, slot in edges:
        edge.input[slot] = total.output[0]
    _insert(model, [name], *nodes)
    _insert(model, [target, nodes[-1].output[0]], total)


@mutation
def odd_names(model: ModelProto, rng: random.Random) -> None:
    """Names of nodes, or of a value, are empty, long, misleading, or there twice."""
    one, two, new = *rng.choices(model.graph.node, k=2), rng.choice(_NAMES)
    change = rng.randrange(5)
    if change == 0:
        one.name = two.name
    elif change == 1 and one.output and two.output:
        one.output[0] = two.output[0]
    elif change == 2:
        rename(model.graph, {_value(model, rng): new})
    else:
        for node in model.graph.node if change == 3 else [one]:
            node.name = "" if change == 3 else new


@mutation
def reorder(model: ModelProto, rng: random.Random) -> None:
    """A node stands elsewhere, maybe before what it reads."""
    node = model.graph.node.pop(rng.randrange(len(model.graph.node)))
    model.graph.node.insert(rng.randrange(len(model.graph.node) + 1), node)


@mutation
def wrong_weight(model: ModelProto, rng: random.Random) -> None:
    """A weight gets another shape or type than its readers expect."""
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    change = rng.randrange(5)
    try:
        data = numpy_helper.to_array(tensor)
    except (TypeError, ValueError):
        change = 4
    if change == 0:
        data = data[..., None]
    elif change == 1:
        data = data.reshape(-1)
    elif change == 2:
        data = data[:0] if data.ndim else data
    elif change == 3:
        data = data.astype(rng.choice((np.float16, np.int64, np.float64, np.bool_)))
    else:
        tensor.data_type = rng.choice((*_TYPES, 0, 99))
        return
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(data), tensor.name))


@mutation
def wrong_declaration(model: ModelProto, rng: random.Random) -> None:
    """A value is declared with another type or shape, or none is."""
    graph = model.graph
    info = rng.choice([*graph.input, *graph.output, *graph.value_info])
    kind = info.type.tensor_type
    change = rng.randrange(6)
    if change == 0:
        kind.elem_type = rng.choice((*_TYPES, 0, 99))
    elif change == 1:
        info.ClearField("type")
    elif change == 2:
        kind.ClearField("shape")
    elif change == 3 and kind.shape.dim:
        dim = rng.choice(kind.shape.dim)
        dim.Clear()
        if rng.random() < 0.7:
            dim.dim_value = rng.choice((0, 1, 2, 4, 8, -1))
    elif change == 4:
        del graph.value_info[:]
    else:
        kind.shape.dim.add(dim_value=rng.choice((1, 3)))


@mutation
def change_attribute(model: ModelProto, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    node = rng.choice(nodes)
    attribute = rng.choice(node.attribute)
    if rng.random() < 0.2:
        del node.attribute[:]
    elif attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.randrange(-4, 5)
    elif attribute.type == AttributeProto.INT:
        attribute.i = rng.randrange(-4, 5)
    elif rng.random() < 0.5:
        attribute.ref_attr_name = "outer"
    else:
        attribute.name = rng.choice(_NAMES)


@mutation
def other_ends(model: ModelProto, rng: random.Random) -> None:
    """Inputs and outputs come in another order, are missing, there twice, or both at once."""
    inputs, outputs = list(model.graph.input), list(model.graph.output)
    rng.shuffle(outputs)
    more: list[onnx.ValueInfoProto]
    more = rng.choice(([], [outputs[0]], [rng.choice(inputs)]))
    outputs = outputs[rng.choice((0, 0, 1)) :] + more
    if rng.random() < 0.3:
        del model.graph.input[rng.randrange(len(inputs))]
    copies = [onnx.ValueInfoProto.FromString(output.SerializeToString()) for output in outputs]
    del model.graph.output[:]
    model.graph.output.extend(copies)


@mutation
def weight_elsewhere(model: ModelProto, rng: random.Random) -> None:
    """A weight is a graph's input too, as older exporters do it, or a Constant node."""
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    if rng.random() < 0.5:
        info = model.graph.input.add(name=tensor.name)
        info.type.tensor_type.elem_type = tensor.data_type
        for size in tensor.dims:
            info.type.tensor_type.shape.dim.add(dim_value=size)
    else:
        name = _fresh(model.graph, "made")
        node = NodeProto(op_type="Constant", name=name, output=[tensor.name])
        node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(tensor)
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, node)


@mutation
def wrap_in_if(model: ModelProto, rng: random.Random) -> None:
    """A stretch of nodes moves into both branches of an If, which reads it from outside."""
    nodes = model.graph.node
    begin, count = rng.randrange(len(nodes)), rng.choice((1, 1, 2, 5, 20))
    taken = [NodeProto.FromString(n.SerializeToString()) for n in nodes[begin : begin + count]]
    inside = {name for node in taken for name in node.output if name}
    read = {name for node in [*nodes[:begin], *nodes[begin + count :]] for name in node.input}
    given = sorted(inside & (read | {value.name for value in model.graph.output}))
    if not given:
        return
    del nodes[begin : begin + count]
    choice = NodeProto(op_type="If", name=_fresh(model.graph, "made_if"), output=given)
    choice.input.append(_constant(model, np.array(rng.random() < 0.5)))
    for name in ("then_branch", "else_branch"):
        body = choice.attribute.add(name=name, type=AttributeProto.GRAPH).g
        body.name = name
        body.node.extend(taken)
        rename(body, {value: f"{name}/{value}" for value in inside}, f"{name}/")
        for value in given:
            output = body.output.add(name=f"{name}/{value}")
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes.insert(begin, choice)


def rename(graph: GraphProto, names: dict[str, str], prefix: str = "") -> None:
    """Renames values wherever they stand, and nodes too if there is a prefix."""
    for node in graph.node:
        for names_of in (node.input, node.output):
            for slot, name in enumerate(names_of):
                names_of[slot] = names.get(name, name)
        node.name = prefix + node.name if prefix and node.name else node.name
        for attribute in node.attribute:
            if attribute.HasField("g"):
                rename(attribute.g, names, prefix)
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in values:
            value.name = names.get(value.name, value.name)


@mutation
def call_function(model: ModelProto, rng: random.Random) -> None:
    """A node becomes the call of a local function that holds it."""
    node = rng.choice(model.graph.node)
    if any(attribute.HasField("g") for attribute in node.attribute) or not node.input:
        return
    inputs, outputs = ([f"{end}{slot}" for slot in range(len(names))] for end, names in
    (("i", node.input), ("o", node.output)))  # fmt: skip
    name = f"Held{len(model.functions)}"
    function = model.functions.add(name=name, domain="local", input=inputs, output=outputs)
    function.opset_import.extend(model.opset_import)
    held = NodeProto(op_type=node.op_type, domain=node.domain, input=inputs, output=outputs)
    held.attribute.extend(node.attribute)
    function.node.append(held)
    node.op_type, node.domain = name, "local"
    del node.attribute[:]
    if all(entry.domain != "local" for entry in model.opset_import):
        model.opset_import.add(domain="local", version=1)


@mutation
def two_models(model: ModelProto, rng: random.Random) -> None:
    """A second copy of everything, with its own inputs or the first one's, joined or not."""
    second = GraphProto()
    second.CopyFrom(model.graph)
    shared = {value.name for value in second.input} if rng.random() < 0.7 else set()
    if rng.random() < 0.5:
        shared |= {tensor.name for tensor in second.initializer}
    names = {n: f"second/{n}" for n in value_names(second) if n not in shared}
    rename(second, names, "second/")
    first = model.graph.output[0]
    model.graph.node.extend(second.node)
    model.graph.value_info.extend(v for v in second.value_info if v.name not in shared)
    model.graph.input.extend(v for v in second.input if v.name not in shared)
    model.graph.initializer.extend(t for t in second.initializer if t.name not in shared)
    joined = rng.choice((None, "Add", "Concat"))
    model.graph.output.extend(second.output[0 if joined is None else 1 :])
    if joined is not None:
        ends = (first.name, names.get(first.name, first.name))
        total = _made(model, joined, *ends, **({"axis": -1} if joined == "Concat" else {}))
        model.graph.node.append(total)
        first.name = total.output[0]
        first.type.tensor_type.ClearField("shape")


@mutation
def odd_metadata(model: ModelProto, rng: random.Random) -> None:
    """A record of an earlier cut that is none, or one of a layer that is there; another opset."""
    key = rng.choice(("depthcut.plan", "depthcut.plan", "depthcut.kv_renumbering"))
    model.metadata_props.add(key=key, value=rng.choice(_PLANS))
    if rng.random() < 0.3:
        model.opset_import[0].version = rng.choice((1, 7, 11, 13, 17, 18, 20, 23, 99))


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes are flipped, cut off, left out or repeated."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(spoiled)) if spoiled else 0
        change = rng.randrange(5)
        if change == 0 or not spoiled:
            del spoiled[at:]
        elif change == 1:
            del spoiled[at : at + rng.choice((1, 2, 30))]
        elif change == 2:
            spoiled[at:at] = spoiled[at : at + rng.choice((1, 8, 100))]
        else:
            spoiled[at] = (
                rng.randrange(256) if change == 3 else spoiled[at] ^ (1 << rng.randrange(8))
            )
    return bytes(spoiled)


def spoil_locations(model: ModelProto, rng: random.Random) -> None:
    """Offsets, lengths and names of external data change."""
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    for entry in rng.sample(entries, min(len(entries), rng.choice((1, 3)))):
        numbers = ("0", "-1", "64", "1e3", "9" * 30, "", "abc", " 64", "0x40", "１２８")
        paths = ("", ".", "..", "../x", "/etc/hostname", "model.onnx", "nowhere", "a\0b", "é")
        entry.value = rng.choice(paths if entry.key == "location" else numbers)
        if rng.random() < 0.1:
            entry.key = rng.choice(("offset", "length", "location", "checksum", ""))
