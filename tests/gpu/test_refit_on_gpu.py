"""Weights put into engines on a GPU. Skipped, and counted, where there is none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from engine_models import RANGES, VOCABULARY, write_tiny_llama

from exporter.artifacts.latency import Shape
from exporter.engines.build.build import build_engines
from exporter.engines.build.libraries import LIBRARIES, Backend
from exporter.engines.build.refit import refit_engine
from exporter.engines.build.settings import BuildSettings
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import open_engine

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("option", ["strip_weights", "refittable"])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_refitted_engine_computes_with_the_graph_s_weights(
    backend: Backend, option: str, tmp_path: Path
) -> None:
    """No zeros, which a refit can leave behind without a word."""
    if importlib.util.find_spec(LIBRARIES[backend].module) is None:
        pytest.skip(f"{LIBRARIES[backend].module} is not installed")
    onnx = write_tiny_llama(tmp_path)
    built = tmp_path / "built" / "m.engine"
    built.parent.mkdir()
    settings = BuildSettings(**{option: True})
    build_engines(onnx, built, ranges=RANGES, backend=backend, settings=settings)
    engine, record = refit_engine(built, onnx, tmp_path / "new" / "m.engine")
    assert not record.settings.strip_weights
    with open_engine(engine) as runner:
        shape = Shape("decode", 2, 1, 64)
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
        found = runner.run(inputs, ["logits"])["logits"]
    with OnnxRuntimeRunner(onnx, threads=1) as reference:
        wanted = reference.run(inputs, ["logits"])["logits"]
    assert np.abs(wanted).max() > 0
    # fp32 without TF32: sums in another order
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
