"""A backend that is nothing but a runner and its row: ONNX's own reference, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from exporter.artifacts.latency import Phase
from exporter.engines.runners.base import Array, BoundCall, Runner, refuse_cuda
from exporter.engines.runners.registry import Backend
from exporter.engines.tensors import TensorSpec

ROW = Backend(__name__, "ReferenceRunner")


class ReferenceRunner(Runner):
    """One ONNX file on ``onnx.reference``."""

    backend = "reference"
    provider = "numpy"

    def __init__(self, model: Path, *, provider: str = "cpu", threads: int) -> None:
        refuse_cuda(self.backend, provider)
        self.model, self.name, self.threads = model, str(model), threads
        self._evaluator: Any = None

    def __enter__(self) -> Self:
        self._evaluator = ReferenceEvaluator(onnx.load(self.model))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._evaluator = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(_spec, self._loaded().proto_.graph.input))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(map(_spec, self._loaded().proto_.graph.output))

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        self.refuse_missing(inputs)
        names = list(outputs or (spec.name for spec in self.outputs))
        return dict(zip(names, self._loaded().run(names, dict(inputs)), strict=True))

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        self.run(inputs, phase=phase)
        return BoundCall(lambda: self._loaded().run(None, dict(inputs)) and None)

    def _loaded(self) -> Any:
        if self._evaluator is None:
            raise self.not_entered()
        return self._evaluator


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = ir.DataType(tensor.elem_type).numpy()
    sizes = (dim.dim_value or dim.dim_param or None for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype, tuple(sizes))
