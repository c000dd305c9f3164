"""Shapes that the graph doesn't declare, by ONNX's own inference."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from graph_passes.finding.dataflow import is_shape_read
from graph_passes.finding.shapes import carried_dims


def declare_what_is_asked(model: ir.Model, names: Collection[str | None]) -> None:
    """Declares the shapes of those values that something asks for their mere shape.

    What is declared already stays; where inference can't tell, nothing changes. Weights are not
    needed. A graph that declares its shapes costs no inference.
    """
    asked = {
        value.name: value
        for node in model.graph
        for value in node.outputs
        if value.name in names
        and carried_dims(value) is None
        and any(is_shape_read(user) for user, _ in value.uses())
    }
    if not asked:
        return
    copy = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    for node in copy.graph:
        for found in node.outputs:
            if found.name in asked and found.shape is not None:
                value = asked[found.name]
                value.shape, value.type = found.shape.copy(), value.type or found.type
