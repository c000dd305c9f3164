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


def fresh(graph: GraphProto, hint: str) -> str:
    """A name that the graph doesn't have yet."""
    taken = {*value_names(graph), *(node.name for node in graph.node)}
    return next(name for i in range(len(taken) + 1) if (name := f"{hint}_{i}") not in taken)


def _node(model: ModelProto, rng: random.Random) -> NodeProto:
    return rng.choice(model.graph.node)


def _value(model: ModelProto, rng: random.Random) -> str:
    """Any value; more often than not one of the sums, where the sublayers join."""
    sums = [node.output[0] for node in model.graph.node if node.op_type in ("Add", "Sum")]
    return rng.choice(sums if sums and rng.random() < 0.6 else value_names(model.graph))


def _edges(model: ModelProto, name: str) -> list[tuple[NodeProto, int]]:
    return [(node, slot) for node in model.graph.node for slot, read in enumerate(node.input) if
    read == name]  # fmt: skip


def _insert_after(model: ModelProto, name: str, *nodes: NodeProto) -> None:
    """Puts nodes right behind the one that gives a value."""
    place = 0
    for index, node in enumerate(model.graph.node):
        if name in node.output:
            place = index + 1
    for offset, node in enumerate(nodes):
        model.graph.node.insert(place + offset, node)


def _made(model: ModelProto, op_type: str, *inputs: str, **attributes: int) -> NodeProto:
    name = fresh(model.graph, f"made_{op_type}")
    node = NodeProto(op_type=op_type, name=name, input=inputs, output=[f"{name}_out"])
    for key, number in attributes.items():
        node.attribute.add(name=key, type=AttributeProto.INT, i=number)
    return node


def _constant(model: ModelProto, data: object) -> str:
    name = fresh(model.graph, "made_constant")
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    return name


@mutation
def rewire(model: ModelProto, rng: random.Random) -> None:
    """A node reads something else, from before it or, now and then, from behind it."""
    index = rng.randrange(len(model.graph.node))
    node = model.graph.node[index]
    if not node.input:
        return
    before = [name for earlier in model.graph.node[:index] for name in earlier.output if name]
    names = value_names(model.graph) if rng.random() < 0.2 or not before else before
    node.input[rng.randrange(len(node.input))] = rng.choice(names)


@mutation
def rewire_alike(model: ModelProto, rng: random.Random) -> None:
    """A node reads what another of its type reads: mostly the shapes agree."""
    node = _node(model, rng)
    alike = [other for other in model.graph.node if other.op_type == node.op_type]
    other = rng.choice(alike)
    if node.input and other.input:
        slot = rng.randrange(min(len(node.input), len(other.input)))
        node.input[slot] = other.input[slot]


@mutation
def swap_operands(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if len(node.input) > 1:
        one, two = rng.sample(range(len(node.input)), 2)
        node.input[one], node.input[two] = node.input[two], node.input[one]


@mutation
def drop_node(model: ModelProto, rng: random.Random) -> None:
    """A node goes; its readers read its first operand, or nothing that exists."""
    index = rng.randrange(len(model.graph.node))
    node = model.graph.node[index]
    if node.input and rng.random() < 0.8:
        for reader in model.graph.node:
            for slot, name in enumerate(reader.input):
                if name in node.output:
                    reader.input[slot] = node.input[0]
    del model.graph.node[index]


@mutation
def duplicate_node(model: ModelProto, rng: random.Random) -> None:
    """A second copy computes the same; some of the first one's readers read it instead."""
    node = _node(model, rng)
    if not node.output:
        return
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = fresh(model.graph, "copied")
    for i, name in enumerate(node.output):
        copy.output[i] = fresh(model.graph, f"copied_out{i}") if name else ""
    edges = _edges(model, node.output[0])
    for reader, slot in rng.sample(edges, rng.randrange(len(edges) + 1)):
        reader.input[slot] = copy.output[0]
    _insert_after(model, node.output[0], copy)


@mutation
def swap_operator(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
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


@mutation
def read_elsewhere(model: ModelProto, rng: random.Random) -> None:
    """Another node reads a value, and what it makes of it joins some later value."""
    name = _value(model, rng)
    kind = rng.choice(("ReduceMean", "ReduceMax", "Identity", "Relu"))
    reader = _made(model, kind, name, **({"keepdims": 1} if "Reduce" in kind else {}))
    later = [node.output[0] for node in model.graph.node if node.op_type in ("Add", "MatMul")]
    if not later:
        return
    target = rng.choice(later)
    edges = _edges(model, target)
    _insert_after(model, name, reader)
    total = _made(model, "Add", target, reader.output[0])
    for edge, slot in edges:
        edge.input[slot] = total.output[0]
    positions = [target, reader.output[0]]
    _insert_after(model, _last_given(model, positions), total)


def _last_given(model: ModelProto, names: list[str]) -> str:
    given = [name for node in model.graph.node for name in node.output if name in names]
    return given[-1] if given else names[0]


@mutation
def measure(model: ModelProto, rng: random.Random) -> None:
    """Something asks for the shape of a value, and what is made of it changes another."""
    name, target = _value(model, rng), _value(model, rng)
    nodes = [_made(model, "Shape", name)]
    nodes.append(_made(model, "Cast", nodes[0].output[0], to=TensorProto.FLOAT))
    nodes.append(_made(model, "ReduceMean", nodes[1].output[0], keepdims=0))
    nodes.append(_made(model, "Add", target, nodes[2].output[0]))
    for edge, slot in _edges(model, target):
        edge.input[slot] = nodes[3].output[0]
    _insert_after(model, _last_given(model, [name, target]), *nodes)


@mutation
def insert_unary(model: ModelProto, rng: random.Random) -> None:
    """Something stands on one edge, or on all that lead away from a value."""
    name = _value(model, rng)
    edges = _edges(model, name)
    made = _made(model, rng.choice(_UNARY), name)
    for edge, slot in edges if rng.random() < 0.5 else edges[:1]:
        edge.input[slot] = made.output[0]
    _insert_after(model, name, made)


@mutation
def insert_scale(model: ModelProto, rng: random.Random) -> None:
    """A value is multiplied by, or added to, a constant of some shape."""
    name = _value(model, rng)
    shape = rng.choice([(), (1,), (8,), (1, 1, 1), (1, 1, 8), (2, 1, 1), (1, 2, 1, 1, 1)])
    other = _constant(model, np.full(shape, 0.5, np.float32))
    operands = [name, other]
    rng.shuffle(operands)
    made = _made(model, rng.choice(("Add", "Mul", "Sub", "Div")), *operands)
    for edge, slot in _edges(model, name)[: rng.choice((1, 99))]:
        edge.input[slot] = made.output[0]
    _insert_after(model, name, made)


@mutation
def broadcast_operand(model: ModelProto, rng: random.Random) -> None:
    """One operand of a sum only broadcasts to the sum's shape."""
    sums = [node for node in model.graph.node if node.op_type in ("Add", "Mul", "Sub")]
    if not sums:
        return
    node = rng.choice(sums)
    slot = rng.randrange(len(node.input))
    name = node.input[slot]
    axes = _constant(model, np.array([rng.choice((0, 1, 2, -1))], np.int64))
    made = _made(model, rng.choice(("ReduceMean", "ReduceSum")), name, axes, keepdims=1)
    node.input[slot] = made.output[0]
    _insert_after(model, name, made)


@mutation
def insert_cast(model: ModelProto, rng: random.Random) -> None:
    """A value goes through another type and, mostly, back."""
    name = _value(model, rng)
    there = _made(model, "Cast", name, to=rng.choice(_TYPES))
    back = _made(model, "Cast", there.output[0], to=TensorProto.FLOAT)
    back.name, back.output[0] = back.name + "b", back.output[0] + "b"
    both = rng.random() < 0.8
    for edge, slot in _edges(model, name)[: rng.choice((1, 99))]:
        edge.input[slot] = (back if both else there).output[0]
    _insert_after(model, name, *([there, back] if both else [there]))


@mutation
def split_and_join(model: ModelProto, rng: random.Random) -> None:
    """A value is cut in two along an axis and put together again, maybe the other way round."""
    name = _value(model, rng)
    axis = rng.choice((0, 1, 2, -1))
    split = _made(model, "Split", name, axis=axis, num_outputs=2)
    split.output.append(split.output[0] + "_second")
    halves = list(split.output)
    if rng.random() < 0.5:
        halves.reverse()
    joined = _made(model, "Concat", *halves, axis=axis)
    for edge, slot in _edges(model, name)[: rng.choice((1, 99))]:
        edge.input[slot] = joined.output[0]
    _insert_after(model, name, split, joined)


@mutation
def repeat_name(model: ModelProto, rng: random.Random) -> None:
    one, two = _node(model, rng), _node(model, rng)
    if rng.random() < 0.7 or not one.output or not two.output:
        one.name = two.name
    else:
        one.output[0] = two.output[0]


@mutation
def odd_name(model: ModelProto, rng: random.Random) -> None:
    """A node, or a value with all its readers, gets an empty, long or misleading name."""
    new = rng.choice(_NAMES)
    if rng.random() < 0.5:
        _node(model, rng).name = new
        return
    rename(model.graph, {_value(model, rng): new})


@mutation
def no_names(model: ModelProto, rng: random.Random) -> None:
    for node in model.graph.node:
        node.name = ""


@mutation
def reorder(model: ModelProto, rng: random.Random) -> None:
    """Two nodes change places, so that one may stand before what it reads."""
    nodes = model.graph.node
    one, two = rng.randrange(len(nodes)), rng.randrange(len(nodes))
    copy = NodeProto()
    copy.CopyFrom(nodes[one])
    nodes[one].CopyFrom(nodes[two])
    nodes[two].CopyFrom(copy)


@mutation
def dangle(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(("", "nowhere"))


@mutation
def cycle(model: ModelProto, rng: random.Random) -> None:
    index = rng.randrange(len(model.graph.node))
    node, later = model.graph.node[index], rng.choice(model.graph.node[index:])
    if node.input and later.output:
        node.input[rng.randrange(len(node.input))] = later.output[0]


@mutation
def wrong_weight(model: ModelProto, rng: random.Random) -> None:
    """A weight gets another shape or type than its readers expect."""
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    try:
        data = numpy_helper.to_array(tensor)
    except (TypeError, ValueError):
        return
    name = tensor.name
    change = rng.randrange(5)
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
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(data), name))


@mutation
def wrong_declaration(model: ModelProto, rng: random.Random) -> None:
    """A value is declared with another type or shape."""
    graph = model.graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    info = rng.choice(infos)
    kind = info.type.tensor_type
    change = rng.randrange(5)
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
    else:
        kind.shape.dim.add(dim_value=rng.choice((1, 3)))


@mutation
def no_declarations(model: ModelProto, rng: random.Random) -> None:
    del model.graph.value_info[:]


@mutation
def change_attribute(model: ModelProto, rng: random.Random) -> None:
    held = [attribute for node in model.graph.node for attribute in node.attribute]
    if not held:
        return
    attribute = rng.choice(held)
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.randrange(-4, 5)
    elif attribute.type == AttributeProto.INT:
        attribute.i = rng.randrange(-4, 5)
    elif rng.random() < 0.5:
        attribute.ref_attr_name = "outer"
    else:
        attribute.name = rng.choice(_NAMES)


@mutation
def lose_attributes(model: ModelProto, rng: random.Random) -> None:
    del _node(model, rng).attribute[:]


@mutation
def shuffle_outputs(model: ModelProto, rng: random.Random) -> None:
    """The outputs come in another order, or one is missing, or there twice."""
    outputs = list(model.graph.output)
    rng.shuffle(outputs)
    change = rng.randrange(3)
    kept = outputs[1:] if change == 0 else [*outputs, outputs[0]] if change == 1 else outputs
    copies = [onnx.ValueInfoProto.FromString(output.SerializeToString()) for output in kept]
    del model.graph.output[:]
    model.graph.output.extend(copies)


@mutation
def lose_input(model: ModelProto, rng: random.Random) -> None:
    del model.graph.input[rng.randrange(len(model.graph.input))]


@mutation
def pass_input_through(model: ModelProto, rng: random.Random) -> None:
    """A graph input is a graph output as well."""
    model.graph.output.add().CopyFrom(rng.choice(model.graph.input))


@mutation
def weight_as_input(model: ModelProto, rng: random.Random) -> None:
    """A weight is declared among the graph's inputs too, as older exporters do."""
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    info = model.graph.input.add(name=tensor.name)
    info.type.tensor_type.elem_type = tensor.data_type
    for size in tensor.dims:
        info.type.tensor_type.shape.dim.add(dim_value=size)


@mutation
def weight_as_constant(model: ModelProto, rng: random.Random) -> None:
    """A weight becomes a Constant node."""
    if not model.graph.initializer:
        return
    index = rng.randrange(len(model.graph.initializer))
    tensor = model.graph.initializer[index]
    node = NodeProto(op_type="Constant", name=fresh(model.graph, "made"), output=[tensor.name])
    node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(tensor)
    del model.graph.initializer[index]
    model.graph.node.insert(0, node)


@mutation
def wrap_in_if(model: ModelProto, rng: random.Random) -> None:
    """A stretch of nodes moves into both branches of an If, which reads it from outside."""
    stretch = _taken_out(model, rng)
    if stretch is None:
        return
    nodes, given, place = stretch
    condition = _constant(model, np.array(rng.random() < 0.5))
    node = NodeProto(
        op_type="If", name=fresh(model.graph, "made_if"), input=[condition], output=given
    )
    for name in ("then_branch", "else_branch"):
        body = node.attribute.add(name=name, type=AttributeProto.GRAPH).g
        _fill_body(body, nodes, given, name)
    model.graph.node.insert(place, node)


@mutation
def wrap_in_loop(model: ModelProto, rng: random.Random) -> None:
    """A stretch of nodes becomes the body of a Loop that runs once."""
    stretch = _taken_out(model, rng)
    if stretch is None:
        return
    nodes, given, place = stretch
    if len(given) != 1 or not nodes[0].input:
        return
    trips, go_on = _constant(model, np.array(1, np.int64)), _constant(model, np.array(True))
    first = nodes[0].input[0]
    node = NodeProto(
        op_type="Loop", name=fresh(model.graph, "made_loop"),
        input=[trips, go_on, first], output=given,
    )  # fmt: skip
    body = node.attribute.add(name="body", type=AttributeProto.GRAPH).g
    _fill_body(body, nodes, given, "loop")
    for name, kind in (("trip", TensorProto.INT64), ("go_on", TensorProto.BOOL)):
        body.input.add(name=f"{node.name}_{name}").type.tensor_type.elem_type = kind
    body.input.add(name=f"{node.name}_carried").type.tensor_type.elem_type = TensorProto.FLOAT
    body.node.add(op_type="Identity", input=[f"{node.name}_go_on"], output=[f"{node.name}_still"])
    still = onnx.ValueInfoProto(name=f"{node.name}_still")
    still.type.tensor_type.elem_type = TensorProto.BOOL
    body.output.insert(0, still)
    model.graph.node.insert(place, node)


def _taken_out(
    model: ModelProto, rng: random.Random
) -> tuple[list[NodeProto], list[str], int] | None:
    """Some nodes in a row, what is read of them elsewhere, and where they stood."""
    nodes = model.graph.node
    begin = rng.randrange(len(nodes))
    count = rng.choice((1, 1, 2, 5, 20))
    taken = [NodeProto.FromString(n.SerializeToString()) for n in nodes[begin : begin + count]]
    inside = {name for node in taken for name in node.output if name}
    left = [*nodes[:begin], *nodes[begin + count :]]
    read = {name for node in left for name in node.input}
    read |= {value.name for value in model.graph.output}
    given = sorted(inside & read)
    if not given:
        return None
    del nodes[begin : begin + count]
    return taken, given, begin


def _fill_body(body: GraphProto, nodes: list[NodeProto], given: list[str], name: str) -> None:
    body.name = name
    body.node.extend(nodes)
    inside = {value: f"{value}/{name}" for node in nodes for value in node.output if value}
    for node in body.node:
        node.name = f"{node.name}/{name}" if node.name else ""
    rename(body, inside)
    for value in given:
        output = body.output.add(name=inside[value])
        output.type.tensor_type.elem_type = TensorProto.FLOAT


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
    node = _node(model, rng)
    if any(attribute.HasField("g") for attribute in node.attribute) or not node.input:
        return
    function = model.functions.add(
        name=f"Held{len(model.functions)}", domain="local",
        input=[f"i{slot}" for slot in range(len(node.input))],
        output=[f"o{slot}" for slot in range(len(node.output))],
    )  # fmt: skip
    function.opset_import.extend(model.opset_import)
    held = function.node.add()
    held.CopyFrom(node)
    for slot in range(len(node.input)):
        held.input[slot] = f"i{slot}"
    for slot in range(len(node.output)):
        held.output[slot] = f"o{slot}"
    node.op_type, node.domain = function.name, "local"
    del node.attribute[:]
    if all(entry.domain != "local" for entry in model.opset_import):
        model.opset_import.add(domain="local", version=1)


@mutation
def two_models(model: ModelProto, rng: random.Random) -> None:
    """A second copy of everything, with its own inputs or the first one's, joined or not."""
    second = GraphProto()
    second.CopyFrom(model.graph)
    shares_inputs = rng.random() < 0.7
    shared = {value.name for value in second.input} if shares_inputs else set()
    if rng.random() < 0.5:
        shared |= {tensor.name for tensor in second.initializer}
    names = {n: f"second/{n}" for n in value_names(second) if n not in shared}
    rename(second, names, "second/")
    first_output = model.graph.output[0].name
    model.graph.node.extend(second.node)
    model.graph.value_info.extend(v for v in second.value_info if v.name not in shared)
    model.graph.input.extend(v for v in second.input if v.name not in shared)
    model.graph.initializer.extend(t for t in second.initializer if t.name not in shared)
    join = rng.randrange(3)
    if join == 0:
        model.graph.output.extend(second.output)
        return
    ends = [first_output, names.get(first_output, first_output)]
    total = _made(model, "Add" if join == 1 else "Concat", *ends)
    if join == 2:
        total.attribute.add(name="axis", type=AttributeProto.INT, i=-1)
    model.graph.node.append(total)
    model.graph.output[0].name = total.output[0]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.output.extend(second.output[1:])


@mutation
def second_stream(model: ModelProto, rng: random.Random) -> None:
    """A value runs along beside the stream and joins it again later."""
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    if len(sums) < 2:
        return
    first, second = sorted(rng.sample(range(len(sums)), 2))
    source, sink = sums[first].output[0], sums[second].output[0]
    weight = _constant(model, np.eye(8, dtype=np.float32))
    beside = _made(model, rng.choice(("MatMul", "Mul", "Identity")), source)
    if beside.op_type != "Identity":
        beside.input.append(weight if beside.op_type == "MatMul" else source)
    joined = _made(model, "Add", sink, beside.output[0])
    for edge, slot in _edges(model, sink):
        edge.input[slot] = joined.output[0]
    _insert_after(model, source, beside)
    _insert_after(model, sink, joined)


@mutation
def odd_metadata(model: ModelProto, rng: random.Random) -> None:
    """A record of an earlier cut that is no such thing, or one of a layer that is there."""
    texts = (
        "", "{}", "[1]", "null", '[{"layer": 0, "kind": "mlp", "replacement": "none"}]',
        '[{"layer": 1e999, "kind": "mlp"}]', '[{"layer": -3, "kind": "attention"}]', "[" * 2000,
        '[{"layer": 1, "kind": "attention", "replacement": "none"}]',
    )  # fmt: skip
    key = rng.choice(("depthcut.plan", "depthcut.plan", "depthcut.kv_renumbering"))
    model.metadata_props.add(key=key, value=rng.choice(texts))


@mutation
def other_opset(model: ModelProto, rng: random.Random) -> None:
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
