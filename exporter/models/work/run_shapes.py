"""The shapes of all values of a graph for one run, found without running it.

ONNX's inference is asked node by node, so that it is told what is known by then: the contents of
small values, which shapes are computed from, are calculated on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.checker import ValidationError
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_node_outputs

from exporter.models.work.fused_shapes import RULES, Shape
from graph_passes.finding.dataflow import subgraphs
from graph_passes.replacements import array_of

_MOST = 1024
"""Numbers of a value that is calculated; masks and weights aren't."""
_CALCULATED = frozenset(
    {"Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Sign", "Min", "Max", "Floor", "Ceil", "Pow"}
    | {
        "Sqrt",
        "Clip",
        "Cast",
        "Identity",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
    }
    | {"Gather", "Slice", "Concat", "Split", "Where", "Equal", "Less", "LessOrEqual", "Greater"}
    | {"GreaterOrEqual", "And", "Or", "Not", "ReduceSum", "ReduceProd", "ReduceMin", "ReduceMax"}
    | {"CumSum", "NonZero"}
)
"""What shapes are computed with."""
_GROWING = frozenset({"ConstantOfShape", "Expand", "Range", "Tile"})
"""Likewise, but what they make may be of any size."""

Content = NDArray[np.generic]


class RunShapes:
    """The shapes of one run.

    Args:
        model: The graph.
        inputs: The shapes of its inputs.
    """

    def __init__(self, model: ir.Model, inputs: Mapping[ir.Value, Shape]) -> None:
        self._shapes: dict[ir.Value, Shape] = dict(inputs)
        self._dtypes: dict[ir.Value, ir.DataType] = {}
        self._contents: dict[ir.Value, Content] = {}
        self._opsets = dict(model.opset_imports)
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                self._know_tensor(value, value.const_value)
        for node in model.graph:
            self._follow(node)

    def of(self, value: ir.Value | None) -> Shape | None:
        """A value's shape; None where it can't be told."""
        if value is None:
            return None
        return self._shapes[value] if value in self._shapes else _declared(value)

    def nbytes(self, value: ir.Value) -> int | None:
        """The bytes that a value takes; None where its shape or type can't be told."""
        shape, dtype = self.of(value), self._dtype(value)
        if shape is None or dtype is None:
            return None
        return math.ceil(math.prod(shape) * dtype.itemsize)

    def _know_tensor(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        self._shapes[value] = tuple(tensor.shape.numpy())
        self._dtypes[value] = tensor.dtype
        if tensor.size <= _MOST and tensor.dtype != ir.DataType.STRING:
            self._contents[value] = array_of(tensor)

    def _follow(self, node: ir.Node) -> None:
        attribute = node.attributes.get("value")
        if node.op_type == "Constant" and attribute is not None and not attribute.is_ref():
            self._know_tensor(node.outputs[0], attribute.as_tensor())
        elif not self._calculate(node):
            self._infer(node)

    def _calculate(self, node: ir.Node) -> bool:
        """Finds what small outputs hold, where all inputs are known."""
        if node.domain:
            return False
        if node.op_type in ("Shape", "Size"):
            return self._measure(node)
        read = [value for value in node.inputs if value is not None]
        given = {value: self._contents[value] for value in read if value in self._contents}
        if not all(value in given for value in read) or not self._is_small(node):
            return False
        try:
            results = _evaluated(node, given, self._opsets)
        except Exception:  # the reference lacks the operator, or it fails: nothing is known
            return False
        for value, found in zip(node.outputs, results, strict=False):
            self._know(value, found)
        return True

    def _is_small(self, node: ir.Node) -> bool:
        if node.op_type not in _GROWING:
            return node.op_type in _CALCULATED
        self._infer(node)
        shape = self.of(node.outputs[0])
        return shape is not None and 0 <= math.prod(shape) <= _MOST

    def _measure(self, node: ir.Node) -> bool:
        shape = self.of(node.inputs[0]) if node.inputs else None
        if shape is None:
            return False
        if node.op_type == "Size":
            self._know(node.outputs[0], np.array(math.prod(shape), np.int64))
            return True
        start, end = node.attributes.get_int("start", 0), node.attributes.get("end")
        kept = shape[start : None if end is None else end.as_int()]
        self._know(node.outputs[0], np.array(kept, np.int64))
        return True

    def _know(self, value: ir.Value, content: Content) -> None:
        found = np.asarray(content)
        self._shapes[value] = found.shape
        self._dtypes[value] = ir.DataType.from_numpy(found.dtype)
        if found.size <= _MOST:
            self._contents[value] = found

    def _infer(self, node: ir.Node) -> None:
        rule = RULES.get(node.op_type)
        if rule is not None and (node.domain or _schema(node, self._opsets) is None):
            try:
                shapes = rule(node, [self.of(value) for value in node.inputs])
            except (IndexError, TypeError, ValueError, ZeroDivisionError):
                return  # operands that the operator doesn't have
            dtypes = [self._dtype(value) for value in node.inputs]
            floats = (each for each in dtypes if each is not None and each.is_floating_point())
            self._note(node, shapes, [next(floats, dtypes[0])] * len(shapes))
        elif not any(True for _ in subgraphs(node)):
            self._ask_onnx(node)

    def _ask_onnx(self, node: ir.Node) -> None:
        schema = _schema(node, self._opsets)
        read = [value for value in node.inputs if value is not None]
        types = {value.name or "": self._type_of(value) for value in read}
        known = {name: found for name, found in types.items() if found is not None}
        if schema is None or len(known) < len(types):
            return
        contents = {value.name or "": self._contents[value] for value in read
                    if value in self._contents}  # fmt: skip
        data = {name: numpy_helper.from_array(found, name) for name, found in contents.items()}
        versions = [onnx.OperatorSetIdProto(domain=d, version=v) for d, v in self._opsets.items()]
        try:
            told = infer_node_outputs(
                schema, ir.serde.serialize_node(node), known, data, opset_imports=versions
            )
        except (InferenceError, ValidationError, RuntimeError, ValueError):
            return
        found = [told[value.name].tensor_type if value.name in told else None
                 for value in node.outputs]  # fmt: skip
        shapes = [None if each is None else _whole(each) for each in found]
        dtypes = [None if each is None else ir.DataType(each.elem_type) for each in found]
        self._note(node, shapes, dtypes)

    def _note(
        self,
        node: ir.Node,
        shapes: Sequence[Shape | None],
        dtypes: Sequence[ir.DataType | None],
    ) -> None:
        for value, shape, dtype in zip(node.outputs, shapes, dtypes, strict=False):
            if shape is not None:
                self._shapes[value] = shape
            if dtype is not None:
                self._dtypes[value] = dtype

    def _dtype(self, value: ir.Value | None) -> ir.DataType | None:
        if value is None:
            return None
        return self._dtypes.get(value) or value.dtype

    def _type_of(self, value: ir.Value) -> onnx.TypeProto | None:
        shape, dtype = self.of(value), self._dtype(value)
        if shape is None or dtype is None:
            return None
        dims = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in shape]
        return onnx.TypeProto(
            tensor_type=onnx.TypeProto.Tensor(
                elem_type=dtype.value, shape=onnx.TensorShapeProto(dim=dims)
            )
        )


def _declared(value: ir.Value) -> Shape | None:
    """What is declared of a value, where that is numbers alone."""
    if value.shape is None:
        return None
    sizes = tuple(size for size in value.shape if isinstance(size, int))
    return sizes if len(sizes) == len(value.shape) else None


def _whole(found: onnx.TypeProto.Tensor) -> Shape | None:
    if not found.HasField("shape"):
        return None
    dims = found.shape.dim
    return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None


def _schema(node: ir.Node, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    version = opsets.get(node.domain)
    try:
        return onnx.defs.get_schema(node.op_type, version or 1, node.domain)
    except onnx.defs.SchemaError:
        return None


def _evaluated(
    node: ir.Node, given: Mapping[ir.Value, Content], opsets: Mapping[str, int]
) -> Sequence[Content]:
    """What one node gives for these inputs."""
    alone = onnx.GraphProto(
        name="node",
        node=[ir.serde.serialize_node(node)],
        input=[onnx.ValueInfoProto(name=value.name or "") for value in given],
        output=[onnx.ValueInfoProto(name=value.name or "") for value in node.outputs],
    )
    feed = {value.name or "": content for value, content in given.items()}
    return list(ReferenceEvaluator(alone, opsets=dict(opsets)).run(None, feed))
