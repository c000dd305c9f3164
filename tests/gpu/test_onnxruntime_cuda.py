"""ONNX Runtime on a GPU. Skipped, and counted, where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.latency import Shape
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import make_inputs, random_tokens
from tests.text_graphs import write_tiny_lm, write_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="onnxruntime-gpu is not installed",
    ),
]


def test_the_gpu_runs_it_and_agrees_with_the_cpu(tmp_path: Path) -> None:
    model, shape, outputs = write_tiny_lm(tmp_path) / "model.onnx", Shape("decode", 1, 1, 8), {}
    for provider in ("cpu", "cuda"):
        with OnnxRuntimeRunner(model, provider=provider, threads=1) as runner:
            inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 32))
            outputs[provider] = runner.run(inputs)["logits"]
    # Sums in another order; TF32 is off.
    np.testing.assert_allclose(outputs["cuda"], outputs["cpu"], rtol=1e-3, atol=1e-3)


def test_a_comparison_on_the_gpu_says_so(tmp_path: Path) -> None:
    arms = [write_tiny_lm(tmp_path / name, noise=noise) for name, noise in (("a", 0), ("b", 0.1))]
    for arm in arms:
        write_tokenizer(arm)
    options = CompareOptions(provider="cuda", prefill_lengths=(16,), rounds=2, eval_tokens=512)
    report = compare(*arms, options, plan=[PlannedDeletion(layer=0, kind="mlp")])
    assert report.arms.baseline.provider == "CUDAExecutionProvider"
    assert report.environment.gpu is not None
