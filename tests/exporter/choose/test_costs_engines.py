"""Costs on engines: what is built for which variant, by a builder that only copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.choose.costs.backend_cost_runners import EngineCostRunner, ranges_for
from exporter.choose.costs.measuring import CostSettings, measure_on
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.timing import Effort
from exporter.engines.build.profiles import Span
from tests.tiny_graphs import tiny_model

pytest.importorskip("onnxruntime")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, Any]]:
    """What was built: the graph's name, where to, and the ranges. ONNX Runtime stands for it."""
    from exporter.engines.build.libraries import Driver
    from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner

    results: list[tuple[str, Path, Any]] = []

    def build_engines(onnx: Path, target: Path, *, ranges: Any, **_: Any) -> list[Any]:
        results.append((onnx.name, target, ranges))
        return [(Path(shutil.copy(onnx, target / "model.engine")), None)]

    module = "exporter.choose.costs.backend_cost_runners"
    monkeypatch.setattr(f"{module}.ask_driver", lambda: Driver(problem=""))
    monkeypatch.setattr(f"{module}.build_engines", build_engines)
    monkeypatch.setattr(
        f"{module}.open_engine", lambda paths: OnnxRuntimeRunner(paths[0], threads=1)
    )
    return results


def test_an_engine_is_built_for_each_variant_and_once_for_the_whole(
    tmp_path: Path, built: list[tuple[str, Path, Any]]
) -> None:
    onnx, work = tmp_path / "model.onnx", tmp_path / "work"
    ir.save(tiny_model(), onnx)
    cost_runner = EngineCostRunner(onnx, work, RequestShape(2, 4, 3))
    effort = Effort(seconds=0.1, rounds=2, reload=False)
    table = measure_on(
        cost_runner,
        CostSettings(RequestShape(2, 4, 3), replacements=("bias",), effort=effort),
        [(0, "mlp")],
    )  # fmt: skip
    assert (table.backend, table.provider) == ("tensorrt-rtx", "tensorrt-rtx")
    assert sorted(name for name, _, _ in built) == [
        "model.onnx", "model.variant.onnx", "model.variant.onnx",
    ]  # fmt: skip
    assert [path.exists() for name, path, _ in built if "variant" in name] == [False, False]
    assert all(ranges.batch == Span(2, 2, 2) for _, _, ranges in built)


def test_an_engine_serves_the_request_and_no_more() -> None:
    ranges = ranges_for(RequestShape(2, 100, 29))
    assert ranges.prompt == Span(1, 100, 100)
    assert ranges.context == Span(1, 114, 128)
    assert ranges_for(RequestShape(1, 100, 0)).context == Span(1, 100, 100)
