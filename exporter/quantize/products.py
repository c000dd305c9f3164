"""Which products and which table of a graph hold weights that can be quantised, and which don't."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.errors import QuantizationError
from graph_passes.replacements import array_of

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCTS = frozenset({"MatMul", "Gemm"})
_HOLDERS = frozenset(
    {"Attention", "EmbedLayerNormalization", "FusedMatMul", "FusedGemm", "MoE", "Conv", "Einsum"}
)
"""Operators that hold weights too, in float only."""
_TOWARDS_LOGITS = frozenset(
    {"Cast", "Identity", "Mul", "Div", "Tanh", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Gather"}
)
_TOWARDS_IDS = frozenset({"Cast", "Identity", "Reshape"})
_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})


@dataclass(frozen=True, eq=False)
class Product:
    """A product of activations with a weight, or the embedding of tokens: its matrix is a head's.

    That is ``Gather(weight, ids)``, a row of ``depth`` numbers for each of ``width`` tokens.
    """

    node: ir.Node
    name: str
    weight: ir.Value
    transposed: bool
    head: bool = False

    @property
    def depth(self) -> int:
        """How many numbers a sum runs over: ``K``."""
        return self._size(1 if self.transposed else 0)

    @property
    def width(self) -> int:
        """How many results there are: ``N``."""
        return self._size(0 if self.transposed else 1)

    def _size(self, axis: int) -> int:
        tensor = self.weight.const_value
        assert tensor is not None
        return tensor.shape.numpy()[axis]

    @property
    def bias(self) -> ir.Value | None:
        """What a Gemm adds."""
        inputs = self.node.inputs
        return inputs[2] if self.node.op_type == "Gemm" and len(inputs) > 2 else None

    def matrix(self) -> NDArray[np.float32]:
        """The weight as ``[depth, width]``, float32, in memory."""
        array = read_array(self.weight)
        if not np.isfinite(array).all():
            raise QuantizationError(
                f"The weight of {self.name} holds NaN or infinite numbers, which have no rounding.",
                "Export the model again.",
                code="not-finite",
            )
        return np.ascontiguousarray(array.T if self.transposed else array)

    def reads_same(self, other: Product) -> bool:
        """Whether another reads the same matrix."""
        return self.weight is other.weight and self.transposed == other.transposed


@dataclass(frozen=True)
class Products:
    """What was found."""

    products: tuple[Product, ...]
    table: Product | None  # the largest embedding
    in_float: dict[str, str]


@dataclass(frozen=True)
class Quantised:
    """What was done."""

    bits: dict[int, int]  # how many products have how many bits
    head_bits: int | None = None  # None where there is none, or it stayed in float
    embedding_bits: int | None = None
    in_float: dict[str, str] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    rounded_anew: dict[str, str] = field(default_factory=dict)


def find_products(model: ir.Model) -> Products:
    """Looks through the main graph; no weight is read.

    A product of two activations, as attention has them, is none.
    """
    last = _last_product(model)
    products: list[Product] = []
    in_float: dict[str, str] = {}
    for node in model.graph.all_nodes():
        if node.op_type in _HOLDERS and any(map(_is_weight, node.inputs)):
            in_float[name_of(node)] = f"its operator, {node.op_type}, takes float weights only"
        if node.op_type not in PRODUCTS or node.domain or not _has_weight(node):
            continue
        reason = _obstacle(node, model)
        if reason is not None:
            in_float[name_of(node)] = reason
            continue
        weight, transposed = _weight_of(node)
        assert weight is not None
        products.append(Product(node, name_of(node), weight, transposed, node is last))
    tables = filter(None, map(_as_table, model.graph))
    largest = max(tables, key=lambda table: table.width, default=None)
    return Products(tuple(products), largest, in_float)


def name_of(node: ir.Node) -> str:
    """What a node is called in settings and records: its name, or else its first output's."""
    return node.name or node.outputs[0].name or node.op_type


def read_array(value: ir.Value) -> NDArray[np.float32]:
    """An initializer's numbers in float32."""
    tensor = value.const_value
    assert tensor is not None
    array: NDArray[np.float32] = np.asarray(array_of(tensor)).astype(np.float32)
    return array


def _has_weight(node: ir.Node) -> bool:
    return any(_constant(value) is not None for value in node.inputs[:2])


def _constant(value: ir.Value | None) -> ir.Value | None:
    """The initializer that an operand is, or is the turned form of."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    made = value.producer() if value is not None else None
    constant = made is not None and made.op_type == "Constant"
    return value if value is not None and (value.is_initializer() or constant) else None


def _is_weight(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return tensor is not None and len(tensor.shape) > 1 and tensor.dtype.name in _FLOATS


def _weight_of(node: ir.Node) -> tuple[ir.Value | None, bool]:
    """The second operand's initializer, and whether it is read turned."""
    weight = _constant(node.inputs[1])
    through = weight is not node.inputs[1]
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return weight, through != turned


def _obstacle(node: ir.Node, model: ir.Model) -> str | None:
    """Why a product with a weight stays in float."""
    weight, _ = _weight_of(node)
    checks = (
        (node.graph is not model.graph, "it stands in a subgraph"),
        (weight is None, "its weight is the first operand"),
        (weight is not None and not _is_plain(weight), "its weight is no plain initializer"),
        (weight is not None and not _is_float_matrix(weight), "its weight is no float matrix"),
        (not _is_turned_over(node.inputs[1]), "its weight is turned by more than a transposition"),
        (node.op_type == "Gemm" and not _is_simple_gemm(node), "a Gemm with factors or a matrix"),
    )
    return next((reason for wrong, reason in checks if wrong), None)


def _is_plain(weight: ir.Value) -> bool:
    return weight.const_value is not None and not weight.is_graph_input()


def _is_float_matrix(weight: ir.Value) -> bool:
    tensor = weight.const_value
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype.name in _FLOATS


def _is_turned_over(value: ir.Value | None) -> bool:
    """Whether a value is a matrix as it is, or a Transpose that turns one over."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Transpose":
        return True
    return list(producer.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _is_simple_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    rank = None if bias is None or bias.shape is None else len(bias.shape)
    return (
        attributes.get_int("transA", 0) == 0
        and attributes.get_float("alpha", 1.0) == 1.0
        and attributes.get_float("beta", 1.0) == 1.0
        and (bias is None or (rank == 1 and _constant(bias) is not None))
    )


def _last_product(model: ir.Model) -> ir.Node | None:
    """The product that the first output comes from, with nothing but scaling in between."""
    value: ir.Value | None = model.graph.outputs[0] if model.graph.outputs else None
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in PRODUCTS and _has_weight(node):
            return node
        if node.op_type not in _TOWARDS_LOGITS:
            return None
        value = next((v for v in node.inputs if v is not None and not v.is_initializer()), None)
    return None


def _as_table(node: ir.Node) -> Product | None:
    """A table that a graph's input selects from."""
    if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
        return None
    rows, ids = node.inputs[:2]
    weight = _constant(rows)
    if weight is None or not (_is_plain(weight) and _is_float_matrix(weight)):
        return None
    if not _is_turned_over(rows):
        return None
    while ids is not None and not ids.is_graph_input():
        source = ids.producer()
        ids = source.inputs[0] if source is not None and source.op_type in _TOWARDS_IDS else None
    name = weight.name or "the embedding"
    return Product(node, name, weight, weight is rows) if ids is not None else None
