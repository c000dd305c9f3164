"""The KV cache of deleted attentions: its inputs and outputs, and who reads its length."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain

import onnx_ir as ir

from graph_passes.errors import SurgeryError
from graph_passes.finding.dataflow import is_shape_read
from graph_passes.finding.shapes import Dim, carried_dims, dims
from graph_passes.plan_record import record_renumbering, recorded_renumbering

_FEW = 16
_SHAPE_TAKES_A_RANGE = 15  # the opset
_NUMBER = re.compile(r"(?<![A-Za-z0-9])[0-9]{1,4}(?![A-Za-z0-9])")


def drop_outputs(graph: ir.Graph, outputs: Collection[ir.Value]) -> None:
    """Takes values out of the graph's outputs."""
    gone = set(outputs)
    kept = [value for value in graph.outputs if value not in gone]
    graph.outputs.clear()
    graph.outputs.extend(kept)


def drop_inputs(graph: ir.Graph, inputs: Collection[ir.Value]) -> None:
    """Takes values out of the graph's inputs."""
    for value in inputs:
        for reader, _ in value.uses():
            raise SurgeryError(
                f"{reader.op_type} {reader.name!r} still needs {value.name!r}, and no input that "
                "stays has the same length.",
                "Keep the attention that it belongs to, or another one of the same cache length.",
                code="cache-still-read",
            )
    gone = set(inputs)
    kept = [value for value in graph.inputs if value not in gone]
    graph.inputs.clear()
    graph.inputs.extend(kept)


def resource_shape_reads(
    graph: ir.Graph, values: Iterable[ir.Value], survivors: Sequence[ir.Value]
) -> None:
    """Points those who read only the shape of a dying value to others that stay.

    Exporters read the past length from one layer's cache on behalf of all. A survivor will do
    where the axes that are read have the same sizes or names; failing that, the shape is put
    together from several.
    """
    for value in values:
        for reader, slot in list(value.uses()):
            if not is_shape_read(reader):
                continue
            if stand_in := _stand_in(value, reader, survivors):
                reader.replace_input_with(slot, stand_in)
            elif reader.op_type == "Shape" and reader.graph is graph:
                _rebuild_shape(graph, value, reader, survivors)


def _rebuild_shape(
    graph: ir.Graph, value: ir.Value, reader: ir.Node, survivors: Sequence[ir.Value]
) -> None:
    """Replaces a Shape node by its axes' sizes, each from its own source, if all have one."""
    wanted = carried_dims(value)
    if wanted is None or graph.opset_imports.get("", 0) < _SHAPE_TAKES_A_RANGE:
        return
    needed = axes_read(reader, len(wanted))
    sources = [
        _axis_source(wanted[axis], axis in needed, survivors) for axis in _span(reader, len(wanted))
    ]
    nodes = [source for source in sources if source is not None]
    if len(nodes) != len(sources):
        return
    if len(nodes) > 1:
        joined = ir.Node("", "Concat", [n.outputs[0] for n in nodes], [ir.AttrInt64("axis", 0)])
        nodes.append(joined)
    result = nodes[-1].outputs[0]
    old = reader.outputs[0]
    result.type, result.shape = old.type, old.shape
    graph.insert_before(reader, nodes)
    if old.is_graph_output():
        result.name, old.name = old.name, None
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(reader, safe=True)


def _axis_source(size: Dim, needed: bool, survivors: Sequence[ir.Value]) -> ir.Node | None:
    """A node that gives one axis' size as ``[size]``; None where nobody knows it."""
    if not needed or isinstance(size, int):
        constant = ir.tensor([size if isinstance(size, int) else 1], ir.DataType.INT64)
        return ir.Node("", "Constant", [], [ir.AttrTensor("value", constant)])
    for survivor in survivors:
        have = dims(survivor) or ()
        if size is not None and size in have:
            axis = have.index(size)
            ends = [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]
            return ir.Node("", "Shape", [survivor], ends)
    return None


def _stand_in(value: ir.Value, reader: ir.Node, survivors: Sequence[ir.Value]) -> ir.Value | None:
    wanted = carried_dims(value)
    if wanted is None:
        return None
    axes = sorted(axes_read(reader, len(wanted)))
    for survivor in survivors:
        have = dims(survivor)
        if have is None or len(have) != len(wanted):
            continue
        if all(have[axis] == wanted[axis] is not None for axis in axes):
            return survivor
    return None


def axes_read(reader: ir.Node, rank: int) -> set[int]:
    """The axes whose sizes a Shape node's readers look at; all where that can't be told."""
    everything = set(range(rank))
    if reader.op_type != "Shape":
        return everything
    span = _span(reader, rank)
    if len(span) < rank:
        return set(span)
    if reader.outputs[0].is_graph_output():
        return everything
    picked: set[int] = set()
    for user, _ in reader.outputs[0].uses():
        indices = _gathered(user)
        if indices is None:
            return everything
        picked.update(index % rank for index in indices)
    return picked or everything


def _span(shape: ir.Node, rank: int) -> list[int]:
    """The axes that a Shape node gives, in order."""
    start = shape.attributes.get_int("start", 0)
    end = shape.attributes.get_int("end", rank)
    return list(range(rank))[start:end]


def _gathered(node: ir.Node) -> list[int] | None:
    """The constant indices of a Gather along axis 0."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    indices = node.inputs[1]
    tensor = ir.convenience.get_const_tensor(indices) if indices is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > _FEW:
        return None
    return [int(index) for index in tensor.numpy().reshape(-1)]


def renumber(
    model: ir.Model, caches: Sequence[ir.Value], outputs: Sequence[ir.Value]
) -> dict[str, str]:
    """Gives the caches that are left dense layer numbers, from 0, in their order.

    The map from the original names stands in the model's metadata afterwards, also where the
    caches had been renumbered before.
    """
    values = [*caches, *outputs]
    old = {value: _layer_number(value) for value in values}
    dense = {number: i for i, number in enumerate(sorted(set(old.values())))}
    originals = {present: original for original, present in recorded_renumbering(model).items()}
    new = {value: _NUMBER.sub(str(dense[old[value]]), value.name or "") for value in values}
    _refuse_taken(model.graph, new)
    names, whole = {}, {}
    for value, after in new.items():
        before = value.name or ""
        if after != before:
            names[before] = after
            value.name = after
        original = originals.get(before, before)
        if original != after:
            whole[original] = after
    record_renumbering(model, whole)
    return names


def _refuse_taken(graph: ir.Graph, new: Mapping[ir.Value, str]) -> None:
    others = chain(graph.inputs, graph.initializers.values(), *(node.outputs for node in graph))
    taken = {value.name for value in others if value not in new}
    for value, name in new.items():
        if name in taken:
            raise SurgeryError(
                f"The cache {value.name!r} can't be renumbered: another value is named {name!r}.",
                "Leave the numbers as they are.",
            )


def is_numbered(value: ir.Value) -> bool:
    """Whether a value's name holds exactly one number, its layer's."""
    return len(_NUMBER.findall(value.name or "")) == 1


def _layer_number(value: ir.Value) -> int:
    matches = _NUMBER.findall(value.name or "")
    if len(matches) != 1:
        raise SurgeryError(
            f"The cache {value.name!r} can't be renumbered: its name holds {len(matches)} numbers.",
            "Leave the numbers as they are.",
            code="cache-still-read",
        )
    return int(matches[0])
