"""What a run of a graph does, counted by hand and by the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import GraphWork
from exporter.models.work.counting import count_work, work_of
from tests.tiny_graphs import HEAD_DIM, HEADS, HIDDEN, INNER, VOCABULARY, TinySpec, tiny_model

LAYERS, PROMPT, PAST = 3, 128, 512
FLOAT = 4


def products(tokens: int, total: int) -> int:
    """Of tiny models, by hand: four projections, two products of attention, an MLP; the head."""
    linear = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER
    attention = 2 * HEADS * HEAD_DIM * total
    return LAYERS * tokens * (linear + attention) + tokens * HIDDEN * VOCABULARY


@pytest.mark.parametrize("fused", [False, True])
def test_products_are_those_that_were_counted_by_hand(fused: bool) -> None:
    found = work_of(tiny_model(TinySpec(fused=fused)))
    assert (found.prompt_tokens, found.step_past) == (PROMPT, PAST)
    assert found.prompt_macs == products(PROMPT, PROMPT)
    assert found.step_macs == products(1, PAST + 1)
    assert not found.uncounted


def test_a_graph_without_annotations_has_the_same_figures() -> None:
    plain, told = (tiny_model(TinySpec(annotated=each)) for each in (False, True))
    assert work_of(plain) == work_of(told)


def test_weights_are_read_once_and_of_tables_a_row() -> None:
    layer = 4 * HIDDEN**2 + 2 * HIDDEN * INNER + 4 * HIDDEN  # two norms with scale and bias
    rest = 2 * HIDDEN + HIDDEN * VOCABULARY + HIDDEN  # the last norm, the head, one row
    assert work_of(tiny_model()).weight_bytes == FLOAT * (LAYERS * layer + rest)


def test_caches_are_read_as_often_as_nodes_take_them() -> None:
    past, present = (FLOAT * HEADS * HEAD_DIM * length for length in (PAST, PAST + 1))
    joined = 2 * past  # Concat of keys, of values
    read = 3 * present  # keys are turned, then multiplied; values are multiplied
    assert work_of(tiny_model()).cache_bytes == LAYERS * (joined + read)
    assert work_of(tiny_model(TinySpec(fused=True))).cache_bytes == LAYERS * joined


def test_an_encoder_has_prompts_alone() -> None:
    found = work_of(tiny_model(TinySpec(cache=False)))
    assert (found.step_past, found.step_macs, found.cache_bytes) == (None, None, None)
    assert found.prompt_macs == products(PROMPT, PROMPT)
    assert found.figures.keys() == {"nodes", "weight_bytes", "prompt_macs"}


def more_nodes(model: ir.Model) -> None:
    (logits, *_) = model.graph.outputs
    node = ir.node("Relu", [logits])
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]


def more_casts(model: ir.Model) -> None:
    product = [node for node in model.graph if node.op_type == "MatMul"][4]
    value = product.inputs[0]
    assert value is not None
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    model.graph.insert_before(product, cast)
    product.replace_input_with(0, cast.outputs[0])


def read_twice(model: ir.Model) -> None:
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.1.value")
    node = ir.node("ReduceMax", [past])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


@pytest.mark.parametrize(
    ("change", "kind", "figures"),
    [
        (more_nodes, "Relu", {"nodes"}),
        (more_casts, "Cast", {"nodes"}),
        (read_twice, "ReduceMax", {"nodes", "cache_bytes"}),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_the_smallest_change_is_seen(
    change: Callable[[ir.Model], None], kind: str, figures: set[str], fused: bool
) -> None:
    model = tiny_model(TinySpec(fused=fused))
    before = work_of(model)
    change(model)
    after = work_of(model)
    assert after.nodes[kind] == before.nodes.get(kind, 0) + 1
    changed = {name for name, value in after.figures.items() if value != before.figures[name]}  # type: ignore[index]
    assert changed == figures
    assert work_of(tiny_model(TinySpec(fused=fused))) == before


def test_counting_changes_no_graph(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "model.onnx"
    ir.save(model, path)
    content = path.read_bytes()
    assert count_work(path) == work_of(model)
    ir.save(model, path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("view", ["Identity", "Reshape"])
def test_weights_behind_a_view_are_read_by_who_reads_the_view(view: str) -> None:
    given = value("x", ir.DataType.FLOAT, 1, 16)
    matrix, shape = weight("w", np.ones((16, 16), np.float32)), weight("s", np.array([16, 16]))
    seen = ir.node(view, [matrix] if view == "Identity" else [matrix, shape])
    used = ir.node("MatMul", [given, seen.outputs[0]])
    graph = ir.Graph(
        [given], used.outputs, nodes=[seen, used], initializers=[matrix, shape],
        opset_imports={"": 20},
    )  # fmt: skip
    assert work_of(ir.Model(graph, ir_version=10)).weight_bytes == FLOAT * 16 * 16


def test_what_a_branch_does_is_told_as_uncounted() -> None:
    chosen = value("chosen", ir.DataType.BOOL)
    bodies = []
    for name in ("then", "else"):
        node = ir.node("Identity", [weight(f"{name}_w", np.ones((16, 16), np.float32))])
        bodies.append(ir.Graph([], node.outputs, nodes=[node], name=name))
    node = ir.node("If", [chosen], {"then_branch": bodies[0], "else_branch": bodies[1]})
    graph = ir.Graph([chosen], node.outputs, nodes=[node], opset_imports={"": 20})
    assert work_of(ir.Model(graph, ir_version=10)).uncounted["If"] >= 1


def test_inputs_of_one_axis_have_no_length() -> None:
    ids = value("input_ids", ir.DataType.INT64, 16)
    node = ir.node("Identity", [ids])
    graph = ir.Graph([ids], node.outputs, nodes=[node], opset_imports={"": 20})
    found = work_of(ir.Model(graph, ir_version=10))
    assert (found.prompt_tokens, found.step_past) == (None, None)


def test_weights_that_several_folders_share_by_links_are_read(tmp_path: Path) -> None:
    """A sweep's cells have hard links to one file of weights, which onnx_ir refuses to read."""
    model, path = tiny_model(), tmp_path / "model.onnx"
    ir.save(model, path, external_data="weights.data", size_threshold_bytes=0)
    (tmp_path / "link.data").hardlink_to(tmp_path / "weights.data")
    assert count_work(path) == work_of(model)


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def weight(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )


def counted(
    node: ir.Node, inputs: list[ir.Value], weights: list[ir.Value], opset: int = 21
) -> GraphWork:
    graph = ir.Graph(
        inputs, node.outputs[:1], nodes=[node], initializers=weights,
        opset_imports={"": opset, "com.microsoft": 1}, name="one",
    )  # fmt: skip
    return work_of(ir.Model(graph, ir_version=10))


def test_a_quantised_product_counts_its_numbers_and_reads_its_packed_bytes() -> None:
    x = value("x", ir.DataType.FLOAT, "batch", "seq", 64)
    packed = weight("packed", np.zeros((32, 2, 16), np.uint8))
    scales = weight("scales", np.ones((32, 2), np.float32))
    told = {"K": 64, "N": 32, "bits": 4, "block_size": 32}
    node = ir.node("MatMulNBits", [x, packed, scales], told, domain="com.microsoft")
    found = counted(node, [x], [packed, scales])
    assert found.prompt_macs == PROMPT * 64 * 32
    assert found.weight_bytes == 32 * 2 * 16 + 32 * 2 * FLOAT


@pytest.mark.parametrize("packed", [False, True])
def test_a_grouped_attention_counts_queries_by_keys(packed: bool) -> None:
    heads, groups, size = 4, 2, 8
    width = (heads + 2 * groups * packed) * size
    query = value("q", ir.DataType.FLOAT, "batch", "seq", width)
    others = [value(n, ir.DataType.FLOAT, "batch", "seq", groups * size) for n in "kv"]
    caches = [
        value(f"past_key_values.0.{part}", ir.DataType.FLOAT, "batch", groups, "past", size)
        for part in ("key", "value")
    ]
    node = ir.node(
        "GroupQueryAttention", [query, *([None, None] if packed else others), *caches],
        {"num_heads": heads, "kv_num_heads": groups}, domain="com.microsoft", num_outputs=3,
    )  # fmt: skip
    found = counted(node, [query, *([] if packed else others), *caches], [])
    assert found.step_macs == 2 * heads * size * (PAST + 1)
    assert found.cache_bytes == 2 * groups * PAST * size * FLOAT


@pytest.mark.parametrize(("domain", "first"), [("", 1), ("com.microsoft", 2)])
def test_of_tables_of_angles_a_row_for_each_token_is_read(domain: str, first: int) -> None:
    x = value("x", ir.DataType.FLOAT, "batch", 4, "seq", 16)
    places = value("input_ids", ir.DataType.INT64, "batch", "seq")
    tables = [weight(name, np.zeros((2048, 8), np.float32)) for name in ("cos", "sin")]
    inputs = [x, *tables, places] if first == 1 else [x, places, *tables]
    node = ir.node("RotaryEmbedding", inputs, domain=domain)
    assert counted(node, [x, places], tables, opset=23).weight_bytes == 2 * PROMPT * 8 * FLOAT


def test_a_transposed_convolution_multiplies_each_input_with_the_kernel() -> None:
    x = value("pixel_values", ir.DataType.FLOAT, "batch", 3, 10, 10)
    kernel = weight("kernel", np.zeros((3, 5, 2, 2), np.float32))
    found = counted(ir.node("ConvTranspose", [x, kernel], {"strides": [2, 2]}), [x], [kernel])
    assert found.prompt_macs == 3 * 10 * 10 * 5 * 2 * 2
    assert (found.prompt_tokens, found.uncounted) == (None, {})


def test_lengths_that_a_graph_fixes_are_told() -> None:
    ids = value("input_ids", ir.DataType.INT64, 1, 16)
    past = value("past_key_values.0.key", ir.DataType.FLOAT, 1, 2, 64, 8)
    table = weight("table", np.zeros((50, 8), np.float32))
    found = counted(ir.node("Gather", [table, ids]), [ids, past], [table])
    assert (found.prompt_tokens, found.step_past) == (16, 64)
    assert found.weight_bytes == 16 * 8 * FLOAT


def test_what_a_graph_does_not_tell_is_named_and_not_guessed() -> None:
    x = value("x", ir.DataType.FLOAT, "batch", "seq", 8)
    found = counted(ir.node("Mystery", [x], domain="com.other"), [x], [])
    assert (found.prompt_macs, found.uncounted) == (0, {"Mystery": 1})


@pytest.mark.parametrize(
    "node",
    [
        ir.node("GroupQueryAttention", [None], domain="com.microsoft"),
        ir.node("Einsum", [None]),
        ir.node("MatMul", [None]),
        ir.node("GatherBlockQuantized", [None], domain="com.microsoft"),
        ir.node("MatMulNBits", [], domain="com.microsoft"),
    ],
)
def test_a_node_without_its_operands_is_not_counted_and_stops_nothing(node: ir.Node) -> None:
    found = counted(node, [], [])
    assert found.prompt_macs == 0
    assert found.nodes == {node.op_type: 1}


@pytest.mark.parametrize("kind", ["Expand", "Tile", "ConstantOfShape"])
def test_a_graph_that_asks_for_much_memory_gets_none(kind: str) -> None:
    size = weight("size", np.array([1 << 20, 1 << 20], np.int64))
    first = [] if kind == "ConstantOfShape" else [weight("one", np.ones((1, 1), np.float32))]
    node = ir.node(kind, [*first, size])
    assert counted(node, [], [*first, size]).nodes == {kind: 1}
