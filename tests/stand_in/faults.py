"""Engines of the stand-in that decode wrongly, as engines on cards did or might."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.sessions import in_float32

Fault = Literal[
    "",
    "rounds",
    "room",
    "more",
    "less",
    "stale",
    "heads",
    "scale",
    "position",
    "mask",
    "cross",
    "nan",
]
FAULTS: dict[Fault, str] = {
    "room": "a step attends all of the room",
    "more": "it attends one position more than is filled",
    "less": "it misses the last one that was filled",
    "stale": "it leaves the caches as they were",
    "heads": "it reads the heads of the caches in another order",
    "scale": "an attention's scale is applied once in place of twice",
    "position": "a step takes the place behind its token's for its own",
    "mask": "a prompt or an encoder takes padding for text",
}
_OF_A_STEP = ("room", "more", "less", "stale", "heads", "position")
ENCODED: dict[Fault, str] = {"cross": "it reads what an encoder gave in another order"}


def in_graph(model: ir.Model, fault: Fault) -> ir.Model:
    """The graph with what is wrong in it; ``rounds`` is as another library may compute it rightly.

    Then sums are made in two parts, in float32, and each result is rounded to the type that it has.
    """
    if fault == "scale":
        for node in model.graph.all_nodes():
            if node.op_type == "Attention":
                scale = node.attributes.get_float("scale", 1.0)
                node.attributes["scale"] = ir.AttrFloat32("scale", scale**0.5)
    if fault != "rounds":
        return model
    for node in list(model.graph):
        if node.op_type == "MatMul" and not node.outputs[0].is_graph_output():
            _in_two_parts(model.graph, node)
    narrow = ShapeInferencePass()(model).model.graph.outputs[0].dtype
    assert narrow is not None
    wide = in_float32(model, narrow)
    for node, old in zip(list(wide.graph), list(model.graph), strict=True):
        for value, was in zip(node.outputs, old.outputs, strict=True):
            if was.dtype == narrow and narrow != ir.DataType.FLOAT:
                uses = list(value.uses())
                down = ir.node("Cast", [value], {"to": narrow})
                up = ir.node("Cast", down.outputs, {"to": ir.DataType.FLOAT})
                wide.graph.insert_after(node, [down, up])
                for user, place in uses:
                    user.replace_input_with(place, up.outputs[0])
    return wide


def _in_two_parts(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = node.inputs
    if x is None or weight is None or weight.const_value is None:
        return
    split = ir.node("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)
    products = []
    for part, array in zip(
        split.outputs, np.array_split(weight.const_value.numpy(), 2), strict=True
    ):
        name = f"{weight.name}.{node.name}.{len(products)}"
        half = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        graph.register_initializer(half)
        products.append(ir.node("MatMul", [part, half]))
    total = ir.node("Add", [product.outputs[0] for product in products])
    graph.insert_before(node, [split, *products, total])
    node.outputs[0].replace_all_uses_with(total.outputs[0])
    graph.remove(node, safe=True)


def computed(graph: Runner, fault: Fault, feed: Mapping[str, Any]) -> dict[str, Any]:
    """What such an engine gives."""
    feed = {spec.name: feed[spec.name].astype(spec.dtype) for spec in graph.inputs}
    if fault == "mask" and feed["input_ids"].shape[1] > 1:
        feed = {**feed, "attention_mask": _without_padding(feed)}
    if fault == "cross":
        feed |= {n: np.roll(array, 1, axis=1) for n, array in feed.items() if "encoder" in n}
    outputs = graph.run(feed)
    if fault == "nan":
        outputs["logits"][...] = np.nan
    if (
        fault in _OF_A_STEP
        and feed["input_ids"].shape[1] == 1
        and feed["attention_mask"].sum() > len(feed["input_ids"])
    ):
        outputs = _wrong(graph, fault, feed, outputs)
    return outputs


def _without_padding(feed: Mapping[str, Any]) -> Array:
    """A mask that is full up to a text's end, or up to its own where there is no cache."""
    mask: Array = feed["attention_mask"]
    ends = mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    if not any(name.startswith("past") for name in feed):
        ends[:] = mask.shape[1]
    return (np.arange(mask.shape[1]) < ends[:, None]).astype(mask.dtype)


def _wrong(
    graph: Runner, fault: Fault, feed: Mapping[str, Any], right: dict[str, Array]
) -> dict[str, Array]:
    if fault == "stale":
        return {name: array for name, array in right.items() if not name.startswith("present")}
    mask = feed["attention_mask"]
    fill, room = int(mask[0].sum()) - 1, mask.shape[1]
    seen = {"room": room - 1, "more": min(fill + 1, room - 1), "less": fill - 1}.get(fault, fill)
    other = {
        **feed,
        "attention_mask": np.broadcast_to(np.arange(room) <= seen, mask.shape).astype(mask.dtype),
    }
    if fault == "position":
        other["position_ids"] = feed["position_ids"] + 1
    if fault == "heads":
        other |= {name: array[:, ::-1] for name, array in feed.items() if name.startswith("past")}
    wrong = graph.run(other)
    for name, array in right.items():
        if name.startswith("present"):  # what is new lies where it should
            array[:, :, fill] = wrong[name][:, :, seen]
    return {**right, "logits": wrong["logits"]}
