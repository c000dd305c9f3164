"""Engines on a GPU, by TensorRT and TensorRT-RTX. Skipped, and counted, where there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from engine_models import VOCABULARY, build_here, skip_unserved, write_tiny_llama

from exporter.artifacts.latency import Shape
from exporter.cli import run
from exporter.engines.build.cuda import Cuda
from exporter.engines.build.engine_set import EngineRecord, find_engines, sidecar_path
from exporter.engines.build.libraries import Backend
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import open_engine
from exporter.engines.tensors import make_inputs, random_tokens
from exporter.errors import BackendError, DepthcutError
from exporter.files import sha256_file
from tests.raising import raises
from tests.text_graphs import write_tokenizer

pytestmark = pytest.mark.gpu

PROMPT = [3, 14, 15, 92, 65]
SHAPES = [
    Shape("prefill", 1, 16),
    Shape("prefill", 2, 5),
    Shape("decode", 1, 1, 64),
    Shape("decode", 2, 1, 255),
]


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    name: Backend = request.param
    skip_unserved(name)
    return name


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["one engine", "split"])
def engines(
    request: pytest.FixtureRequest,
    backend: Backend,
    onnx: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return build_here(onnx, folder, backend, split=request.param == "split")


@pytest.fixture
def memory() -> Iterator[Cuda]:
    """Asks for free memory, outside what is tested."""
    cuda = Cuda("gpu")
    yield cuda
    cuda.close()


def expected(onnx: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    with OnnxRuntimeRunner(onnx, threads=1) as runner:
        return runner.run(inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_computes_what_onnx_runtime_computes(shape: Shape, onnx: Path, engines: Path) -> None:
    with open_engine(engines) as runner:
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
        result = runner.run(inputs)
    wanted = expected(onnx, inputs)
    assert result.keys() == wanted.keys()
    # A prompt's engine gives the logits of its last position.
    wanted["logits"] = wanted["logits"][:, -result["logits"].shape[1] :]
    for name in wanted:  # fp32 without TF32: sums in another order
        np.testing.assert_allclose(result[name], wanted[name], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("fused_attention", [False, True])
def test_half_precision_computes_the_same_to_its_own_precision(
    fused_attention: bool, backend: Backend, tmp_path: Path
) -> None:
    onnx = write_tiny_llama(tmp_path, ir.DataType.FLOAT16, fused_attention=fused_attention)
    folder = build_here(onnx, tmp_path / "engines", backend)
    shape = Shape("decode", 2, 1, 64)
    with open_engine(folder) as runner:
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
        result = runner.run(inputs, ["logits"])["logits"].astype(np.float32)
    wanted = expected(onnx, inputs)["logits"].astype(np.float32)
    # fp16 has 10 bits; the largest logit tells how large a sum was rounded.
    np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-2 * np.abs(wanted).max())


def test_it_generates_the_tokens_of_onnx_runtime(onnx: Path, engines: Path) -> None:
    with TensorRtDecoder(find_engines(engines)) as decoder:
        first = generate(decoder, PROMPT, new_tokens=40)
        again = generate(decoder, PROMPT, new_tokens=40)
    with open_decoder(onnx, threads=1) as reference:
        wanted = generate(reference, PROMPT, new_tokens=40)
    assert first.token_ids == wanted.token_ids
    assert again.token_ids == wanted.token_ids


def test_two_sequences_stay_apart(onnx: Path, engines: Path) -> None:
    prompts, step = np.array([[3, 1, 4], [2, 7, 1]]), np.array([[5], [6]])
    with TensorRtDecoder(find_engines(engines)) as decoder:
        result = [decoder.prefill(prompts), decoder.step(step)]
    with open_decoder(onnx, threads=1) as reference:
        wanted = [reference.prefill(prompts), reference.step(step)]
    np.testing.assert_allclose(result, wanted, rtol=1e-3, atol=1e-3)


def test_the_cache_stays_on_the_device(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    def counting(name: str, place: int) -> None:
        real = getattr(Cuda, name)

        def call(self: Cuda, *arguments: Any) -> None:
            copied.append(arguments[place].nbytes)
            real(self, *arguments)

        monkeypatch.setattr(Cuda, name, call)

    with TensorRtDecoder(find_engines(engines)) as decoder:
        decoder.prefill(np.array([PROMPT]))
        for name, place in (("send", 1), ("fetch", 0)):
            counting(name, place)
        decoder.step(np.array([[7]]))
    assert sorted(copied) == [8, 4 * VOCABULARY]  # a token goes in, its logits come out


def test_two_hundred_steps_take_no_more_memory(engines: Path, memory: Cuda) -> None:
    with TensorRtDecoder(find_engines(engines)) as decoder:
        logits = decoder.prefill(np.array([PROMPT]))
        free = []
        for _ in range(200):
            logits = decoder.step(logits.argmax(-1)[:, None])
            free.append(memory.free_bytes()[0])
    assert free[-1] >= free[20]


def test_leaving_gives_the_memory_back(engines: Path, memory: Cuda) -> None:
    def once() -> int:
        with open_engine(engines, trial=False) as runner:
            assert (runner.capabilities.gpu_memory_bytes or 0) > 0
        return memory.free_bytes()[0]

    once()  # what the libraries keep for the whole process is taken by then
    free = once()
    assert [once() for _ in range(3)] == [free] * 3


def test_a_prepared_call_tells_the_device_s_time(engines: Path) -> None:
    with open_engine(engines) as runner:
        shape = Shape("decode", 1, 1, 64)
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
        call = runner.prepare(inputs, phase="decode")
        call()
        assert call.timed is not None
        for _ in range(20):
            assert 0 < call.timed() < 1000
        again = runner.run(inputs, ["logits"])["logits"]
        assert np.isfinite(again).all()
        with raises(BackendError, "not-entered"):
            call()


def test_what_the_profiles_do_not_hold_is_refused(engines: Path) -> None:
    with open_engine(engines) as runner:
        shape = Shape("decode", 1, 1, 257)
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
        with pytest.raises(BackendError, match="no profile holds this call"):
            runner.run(inputs)
    with TensorRtDecoder(find_engines(engines)) as decoder:
        decoder.prefill(np.array([PROMPT]))
        for _ in range(257 - len(PROMPT)):
            decoder.step(np.array([[1]]))
        with pytest.raises(BackendError, match="a context length of 257"):
            decoder.step(np.array([[1]]))


def test_too_little_memory_is_told_with_what_was_free(memory: Cuda) -> None:
    free, total = memory.free_bytes()
    with pytest.raises(BackendError, match=r"takes .* GB of device memory; .* GB of .* are free"):
        memory.allocate(2 * total, "a cache")
    assert memory.free_bytes()[0] >= free - (64 << 20)
    memory.wait()  # and the next call does not tell of it again


@pytest.mark.parametrize("damage", ["cut off", "garbled"])
def test_a_broken_engine_is_one_line_and_no_crash(
    damage: str, backend: Backend, onnx: Path, tmp_path: Path
) -> None:
    """Its record fits it, so only loading it tells."""
    folder = build_here(onnx, tmp_path / "engines", backend)
    path = next(folder.glob("*.engine"))
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    if damage == "cut off":
        del content[half:]
    else:
        content[64:half] = bytes(half - 64)
    path.write_bytes(content)
    record = EngineRecord.read(sidecar_path(path))
    changes = {"engine_bytes": len(content), "engine_sha256": sha256_file(path)}
    record.model_copy(update=changes).write(sidecar_path(path))
    with pytest.raises(DepthcutError) as caught:
        open_engine(path).__enter__()
    assert "\n" not in caught.value.message
    assert path.name in caught.value.message


def test_the_command_generates(
    engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(tmp_path, [f"w{number}" for number in range(1, VOCABULARY)])
    arguments = ["generate", str(engines), "w3 w14", "-n", "6", "--tokenizer", str(tmp_path)]
    assert run([*arguments, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert len(done["token_ids"]) == 6
    assert run(arguments) == 0
    assert re.findall(r"w\d+", capsys.readouterr().out) == re.findall(r"w\d+", done["text"])
