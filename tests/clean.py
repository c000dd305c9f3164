"""What a clean graph is: valid, and nothing in it that nothing needs."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir


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
