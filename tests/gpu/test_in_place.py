"""Caches in place on a GPU: lengths in an engine for each phase, a mask in one for both."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.engines.build.build import build_engines
from exporter.engines.build.engine_set import find_engines
from exporter.engines.build.libraries import LIBRARIES, Backend
from exporter.engines.build.profiles import fitting, graph_inputs
from exporter.engines.decoding.open_decoder import decoder_on
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.runners.tensorrt import open_engine
from tests.stand_in.decoders import RANGES, ROOM, decoder_onnx

pytestmark = pytest.mark.gpu
sys.path.insert(0, str(Path(__file__).parents[1] / "exporter"))

PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]])
STEPS = np.array([[9, 2, 6], [8, 1, 8], [3, 3, 9], [1, 2, 3]])  # the third is one of a graph


def steps(decoder: TensorRtDecoder | OnnxRuntimeDecoder, rows: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    found = [decoder.prefill(PROMPTS[:rows], context=ROOM)]
    return found + [decoder.step(token[:, None]) for token in STEPS[:, :rows]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_it_continues_as_on_onnx_runtime(
    backend: Backend, split: bool, rows: int, tmp_path: Path
) -> None:
    if importlib.util.find_spec(LIBRARIES[backend].module) is None:
        pytest.skip(f"{LIBRARIES[backend].module} is not installed")
    with OnnxRuntimeDecoder(decoder_onnx(tmp_path / "plain", in_place=False), threads=1) as other:
        wanted = steps(other, rows)
    engines = tmp_path / "engines"
    engines.mkdir()
    onnx = decoder_onnx(tmp_path, in_place=True)
    ranges = fitting(graph_inputs(onnx), RANGES)
    build_engines(onnx, engines, ranges=ranges, backend=backend, split=split)
    with TensorRtDecoder(find_engines(engines)) as decoder:
        first, again = steps(decoder, rows), steps(decoder, rows)
    with open_engine(engines) as runner, decoder_on(runner) as borrowed:
        assert isinstance(borrowed, TensorRtDecoder)
        shared = steps(borrowed, rows)
    for found in (first, again, shared):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
