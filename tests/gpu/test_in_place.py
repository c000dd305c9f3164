"""Caches in place on a GPU, in an engine for each phase and in one for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import skip_unserved

from exporter.artifacts.latency import Shape
from exporter.engines.build.build import build_engines
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.libraries import Backend
from exporter.engines.build.profiles import fitting, graph_inputs
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import decoder_on, open_decoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.runners.base import Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import open_engine
from exporter.engines.tensors import make_inputs, random_tokens
from tests.stand_in.decoders import RANGES, ROOM, decoder_onnx

pytestmark = pytest.mark.gpu

PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]])
BACKENDS = pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
STEPS = np.array([[9, 2, 6], [8, 1, 8], [3, 3, 9], [1, 2, 3]])  # the third is one of a graph


def steps(decoder: Decoder, rows: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    result = [decoder.prefill(PROMPTS[:rows], context=ROOM)]
    return result + [decoder.step(token[:, None]) for token in STEPS[:, :rows]]


def built(folder: Path, backend: Backend, *, split: bool = True) -> tuple[Path, Path]:
    """The graph, and the folder with its engines."""
    skip_unserved(backend)
    onnx, engines = decoder_onnx(folder, in_place=True), folder / "engines"
    engines.mkdir()
    ranges = fitting(graph_inputs(onnx), RANGES)
    build_engines(onnx, engines, ranges=ranges, backend=backend, split=split)
    return onnx, engines


def given(runner: Runner, shape: Shape) -> dict[str, Any]:
    return make_inputs(runner.inputs, shape, random_tokens(shape, 11))


@BACKENDS
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("split", [True, False])
def test_it_continues_as_on_onnx_runtime(
    backend: Backend, split: bool, rows: int, tmp_path: Path
) -> None:
    with open_decoder(decoder_onnx(tmp_path / "plain", in_place=False), threads=1) as other:
        wanted = steps(other, rows)
    _, engines = built(tmp_path, backend, split=split)
    with TensorRtDecoder(find_engines(engines)) as decoder:
        first, again = steps(decoder, rows), steps(decoder, rows)
    with open_engine(engines) as runner, decoder_on(runner) as borrowed:
        assert isinstance(borrowed, TensorRtDecoder)
        shared = steps(borrowed, rows)
    for item in (first, again, shared):
        np.testing.assert_allclose(item, wanted, rtol=1e-3, atol=1e-3)


@BACKENDS
def test_a_step_is_timed_as_one_graph_by_the_device(backend: Backend, tmp_path: Path) -> None:
    _, engines = built(tmp_path, backend)
    with open_engine(engines) as runner:
        call = runner.prepare(given(runner, Shape("decode", 2, 1, 8)), phase="decode")
        call()
        assert call.timed is not None
        assert all(0 < call.timed() < 1000 for _ in range(20))
        assert call.launches() == "CUDA graph"


@BACKENDS
@pytest.mark.parametrize("shape", [Shape("prefill", 2, 5), Shape("decode", 2, 1, 8)], ids=str)
def test_rows_with_padding_before_them_are_as_on_onnx_runtime(
    backend: Backend, shape: Shape, tmp_path: Path
) -> None:
    """An engine for prompts alone knows nothing of it: such rows are moved to the front."""
    onnx, engines = built(tmp_path, backend)
    with OnnxRuntimeRunner(onnx, threads=1) as other, open_engine(engines) as runner:
        inputs = given(runner, shape)
        inputs["attention_mask"][1, :3] = 0
        inputs["position_ids"][1] = np.maximum(inputs["position_ids"][1] - 3, 0)
        result, wanted = (item.run(inputs, ["logits"])["logits"] for item in (runner, other))
    np.testing.assert_allclose(result[:, -1], wanted[:, -1], rtol=1e-3, atol=1e-3)


@BACKENDS
def test_leaving_gives_the_memory_back(backend: Backend, tmp_path: Path) -> None:
    _, engines = built(tmp_path, backend)
    memory = Cuda("gpu")
    free = []
    for _ in range(4):
        with TensorRtDecoder(find_engines(engines), trial=False) as decoder:
            steps(decoder, 3)
        free.append(memory.free_bytes()[0])
    memory.close()
    assert free[1:] == [free[1]] * 3  # the first time the libraries take what they keep
