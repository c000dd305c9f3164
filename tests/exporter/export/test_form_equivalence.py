"""One plan, two forms: the fused candidate gives the portable candidate's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import FormRecord, PlannedDeletion
from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.cut.surgery import prune_file
from exporter.engines.inputs import make_inputs
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.export.forms.targets import write_form
from graph_passes import ReplacementTensors, SublayerRef
from tests.tiny_models import tiny_loaded

pytestmark = [pytest.mark.genai, pytest.mark.usefixtures("exports_once")]

HIDDEN, VOCABULARY = 64, 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "head_dim": 16}
PLAN = [("attention", 1, "none"), ("mlp", 0, "bias"), ("attention", 2, "linear")]
STEPS = {"prefill": [9], "decode": [7, 1, 1], "chunk": [4, 4, 1]}
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9))
FULL = np.ones((2, 9), np.int64)
LEFT = np.array([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]])
"""The second row is padded on the left."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in both forms; biases that are not zero."""
    loaded = tiny_loaded("qwen2", **SIZES)
    for name, weight in loaded.model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.3)
    paths = {}
    for target in ("portable", "onnxruntime-cpu"):
        paths[target] = tmp_path_factory.mktemp(target)
        _, record = write_form(loaded, paths[target], target=target)
        assert isinstance(record, FormRecord)
        assert ("GroupQueryAttention" in record.fused) == (target != "portable")
    return paths


@pytest.fixture(scope="module")
def candidates(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both cut by the same plan, replacements included."""
    rng = np.random.default_rng(1)

    def vector() -> Any:
        return rng.standard_normal(HIDDEN).astype(np.float32)

    weight = (rng.standard_normal((HIDDEN, HIDDEN)) / HIDDEN**0.5).astype(np.float32)
    tensors = {
        SublayerRef(0, "mlp"): ReplacementTensors(vector(), None),
        SublayerRef(2, "attention"): ReplacementTensors(vector(), weight),
    }
    numbers = Replacements(Path("replacements.safetensors"), "0" * 64, tensors)
    plan = [PlannedDeletion(kind=k, layer=n, replacement=r) for k, n, r in PLAN]
    result = {}
    for target, folder in folders.items():
        result[target] = tmp_path_factory.mktemp(f"cut-{target}") / "model.onnx"
        report = prune_file(folder / "model.onnx", result[target], LoadedPlan.of(plan, numbers))
        assert report.verification.passed
    return result


def answers(path: Path, mask: np.ndarray[Any, Any], steps: Sequence[int]) -> Any:
    """The logits of all steps, each on the cache of those before."""
    result, cache, done = [], {}, 0
    with OnnxRuntimeRunner(path, threads=1) as runner:
        for new in steps:
            shape = Shape("prefill", len(mask), new, done)
            given = cache if done else None
            ids = IDS[: len(mask), done : done + new]
            inputs = make_inputs(runner.inputs, shape, ids, cache=given)
            done += new
            inputs["attention_mask"] = mask[:, :done]
            if "position_ids" in inputs:
                positions = (mask[:, :done].cumsum(1) - 1).clip(min=0)
                inputs["position_ids"] = positions[:, -new:]
            outputs = runner.run(inputs)
            cache = {
                n: outputs[n.replace("past_key_values", "present")] for n in inputs if "past" in n
            }
            result.append(outputs["logits"])
    return np.concatenate(result, axis=1)


def limit(wanted: np.ndarray[Any, Any]) -> float:
    return 1e-4 * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("mask", [FULL, LEFT], ids=["full", "left-padded"])
@pytest.mark.parametrize("steps", STEPS)
def test_the_plan_is_one_the_form_is_many(
    candidates: Any, steps: str, mask: np.ndarray[Any, Any]
) -> None:
    wanted = answers(candidates["portable"], mask, STEPS[steps])
    result = answers(candidates["onnxruntime-cpu"], mask, STEPS[steps])
    real = mask.astype(bool)
    assert np.abs(result - wanted)[real].max() <= limit(wanted)
    other = answers(candidates["onnxruntime-cpu"], LEFT if mask is FULL else FULL, STEPS[steps])
    assert np.abs(other - wanted)[real & (LEFT > 0)].max() > 100 * limit(wanted)


def test_another_plan_is_seen(folders: dict[str, Path], candidates: Any, tmp_path: Path) -> None:
    plan = [PlannedDeletion(kind="attention", layer=1), PlannedDeletion(kind="mlp", layer=0)]
    prune_file(folders["onnxruntime-cpu"] / "model.onnx", tmp_path / "model.onnx", plan)
    wanted = answers(candidates["portable"], FULL, [9])
    result = answers(tmp_path / "model.onnx", FULL, [9])
    assert np.abs(result - wanted).max() > 100 * limit(wanted)
