"""Padded rows on an attention that counts its mask give what each row gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.cache_form import needs_packing, run_packed
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError
from graph_passes import save_model
from graph_passes.fusing.one_phase import OnePhasePass
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.raising import raises
from tests.stand_in.decoders import decoder_onnx

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 6, 1, 8, 0, 3, 3, 9]])
MASKS = {
    "left": [[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]],
    "holes": [[1] * 8, [1, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1, 0]],
    "right": [[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
    "none": [[1] * 8] * 3,
}
STEPS = {"prefill": [8], "decode": [6, 1, 1], "chunk": [4, 3, 1]}
PAST = "past_key_values.0.key"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "model.onnx"
    save_model(fused_model(FusedSpec()), path)
    return path


def answers(
    runner: OnnxRuntimeRunner, mask: np.ndarray[Any, Any], steps: Sequence[int], ids: Any = IDS
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The logits of all steps, and the first layer's keys after the last."""
    result, cache, done = [], {}, 0
    for new in steps:
        shape = Shape("prefill", len(ids), new, done)
        if not done:
            cache = {}
        inputs = make_inputs(runner.inputs, shape, ids[:, done : done + new], cache=cache)
        done += new
        inputs["attention_mask"] = mask[:, :done].astype(np.int32)
        outputs = runner.run(inputs)
        cache = {n: outputs[n.replace("past_key_values", "present")] for n in inputs if "past" in n}
        result.append(outputs["logits"])
    return np.concatenate(result, axis=1), cache[PAST]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_padded_row_gives_what_it_gives_alone(path: Path, mask: str, steps: str) -> None:
    masks = np.array(MASKS[mask])
    with OnnxRuntimeRunner(path, threads=1) as runner:
        result, keys = answers(runner, masks, STEPS[steps])
        for row, real in enumerate(masks.astype(bool)):
            ones = np.ones((1, real.sum()))
            wanted, key = answers(runner, ones, [int(real.sum())], IDS[row : row + 1, real])
            limit = 1e-5 * max(1.0, np.abs(wanted).max())
            assert np.abs(result[row, real] - wanted[0]).max() <= limit
            assert np.abs(keys[row][:, real] - key[0]).max() <= 1e-5
            assert not keys[row][:, ~real].any()
        if mask not in ("none", "right"):  # what is behind is not seen anyway
            other, _ = answers(runner, np.ones_like(masks), STEPS[steps])
            assert np.abs(other - result)[masks.astype(bool)].max() > 1e-2


def test_the_runtime_alone_misreads_them(path: Path) -> None:
    """Or refuses: why the runner helps."""
    masks = np.array(MASKS["left"])
    with OnnxRuntimeRunner(path, threads=1) as runner:
        inputs = make_inputs(runner.inputs, Shape("prefill", 3, 8), IDS)
        inputs["attention_mask"] = masks.astype(np.int32)
        right = runner.run(inputs, ["logits"])["logits"]
        wrong = runner._run(inputs, ["logits"])["logits"]
        assert np.abs(right - wrong)[masks.astype(bool)].max() > 1e-2
        inputs = make_inputs(runner.inputs, Shape("prefill", 3, 4, 4), IDS[:, 4:])
        runner.run(inputs)
        with raises(BackendError, "run-failed", "batch_size"):
            runner._run(inputs, ["logits"])


@pytest.mark.parametrize(
    ("new", "mask", "needed"),
    [
        (8, [[1] * 8] * 2, False),
        (1, [[1] * 8] * 2, False),
        (3, [[1] * 8], False),
        (3, [[1] * 8] * 2, True),
        (1, [[1] * 8, [0] + [1] * 7], True),
    ],
)
def test_only_what_is_misread_is_moved(new: int, mask: list[list[int]], needed: bool) -> None:
    call = {"input_ids": np.zeros((len(mask), new)), "attention_mask": np.array(mask)}
    assert needs_packing(call) is needed
    assert not needs_packing({"pixel_values": np.zeros((1, 3))})


def test_what_does_not_fit_together_is_refused(path: Path) -> None:
    with OnnxRuntimeRunner(path, threads=1) as runner:
        inputs = make_inputs(runner.inputs, Shape("decode", 3, 1, 6), IDS[:, :1])
        inputs["attention_mask"] = np.array(MASKS["left"], np.int32)
        with raises(BackendError, "wrong-mask-length", 8):
            runner.run(inputs)


def test_a_past_that_others_read_takes_no_padding(tmp_path: Path) -> None:
    model = fused_model(FusedSpec())
    past = next(value for value in model.graph.inputs if value.name == PAST)
    model.graph.outputs.append(_identity(model, past))
    save_model(model, tmp_path / "model.onnx")
    with OnnxRuntimeRunner(tmp_path / "model.onnx", threads=1) as runner:
        inputs = make_inputs(runner.inputs, Shape("prefill", 3, 8), IDS)
        runner.run(inputs)
        inputs["attention_mask"] = np.array(MASKS["left"], np.int32)
        with raises(BackendError, "no-padding"):
            runner.run(inputs)


def _identity(model: Any, value: Any) -> Any:
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].dtype = "copy", value.dtype
    node.outputs[0].shape = value.shape
    model.graph.append(node)
    return node.outputs[0]


def test_rows_of_a_step_that_is_told_lengths_are_moved_too(tmp_path: Path) -> None:
    """What an engine for decode computes, by its graph on the CPU, against the graph's mask."""
    masked = decoder_onnx(tmp_path, in_place=True)
    model = ir.load(masked)
    assert OnePhasePass("decode")(model).modified
    save_model(model, tmp_path / "decode.onnx")
    shape = Shape("decode", 2, 1, 8)
    with (
        OnnxRuntimeRunner(masked, threads=1) as whole,
        OnnxRuntimeRunner(tmp_path / "decode.onnx", threads=1) as runner,
    ):
        inputs = make_inputs(whole.inputs, shape, random_tokens(shape, 11))
        inputs["attention_mask"][1, :3] = 0
        inputs["position_ids"][1] -= 3
        wanted = whole.run(inputs, ["logits"])["logits"]
        logits = run_packed(runner.run, inputs, ["logits"], runner.cache_form.shared)["logits"]
        misread = runner.run(inputs, ["logits"])["logits"]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert np.abs(misread[1] - wanted[1]).max() > 1e-2
