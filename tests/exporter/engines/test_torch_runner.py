"""PyTorch behind the Runner protocol, held against the ONNX file of the same model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.latency import Shape
from exporter.compare.session import compare
from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import has_cache, make_inputs, random_tokens
from exporter.errors import BackendError, ComparisonError
from tests.engine_support import SHORT
from tests.raising import raises
from tests.tiny_models import family_loaded

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("exports_once")]

TOLERANCE = 1e-5
PREFILL, DECODE, ENCODE = Shape("prefill", 2, 7), Shape("decode", 2, 1, 5), Shape("encode", 2, 7)


@pytest.fixture(scope="module")
def exported(
    exports_once: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Path]]:
    """Makes a tiny model and its ONNX file, once for the module."""
    from exporter.export.torch_export import export_onnx

    @functools.cache
    def made(family: str) -> tuple[Any, Path]:
        loaded = family_loaded(family)
        return loaded, export_onnx(loaded, tmp_path_factory.mktemp(family))

    return made


def torch_runner(loaded: Any, *, compiled: bool = False, threads: int = 1) -> Any:
    from exporter.engines.runners.pytorch import TorchRunner

    return TorchRunner(loaded.model, compiled=compiled, threads=threads)


def inputs_of(runner: Runner, shape: Shape) -> dict[str, Array]:
    return make_inputs(runner.inputs, shape, random_tokens(shape, 128))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_it_takes_and_gives_what_the_onnx_file_does(exported: Any, family: str) -> None:
    loaded, path = exported(family)
    with OnnxRuntimeRunner(path, threads=1) as onnx, torch_runner(loaded) as eager:
        assert [spec.name for spec in eager.inputs] == [spec.name for spec in onnx.inputs]
        assert [spec.dtype for spec in eager.inputs] == [spec.dtype for spec in onnx.inputs]
        assert [spec.name for spec in eager.outputs] == [spec.name for spec in onnx.outputs]
        for shape in (PREFILL, DECODE) if has_cache(onnx.inputs) else (ENCODE,):
            inputs = inputs_of(onnx, shape)
            want, got = onnx.run(inputs), eager.run(inputs)
            for name, value in want.items():
                assert got[name].shape == value.shape
                np.testing.assert_allclose(got[name], value, rtol=0, atol=TOLERANCE)


def test_a_bound_call_runs_the_model_and_threads_are_given_back() -> None:
    import torch

    before = torch.get_num_threads()
    loaded = family_loaded("llama")
    seen = []
    loaded.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with torch_runner(loaded, threads=before + 1) as eager:
        seen.clear()
        call = eager.prepare(inputs_of(eager, DECODE))
        warm = len(seen)
        call()
        assert len(seen) == warm + 1
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_bfloat16_keeps_its_bits() -> None:
    import ml_dtypes
    import torch

    loaded = family_loaded("llama", dtype="bfloat16")
    with torch_runner(loaded) as eager:
        inputs = inputs_of(eager, DECODE)
        present = eager.run(inputs, ["present.0.key"])["present.0.key"]
    past = inputs["past_key_values.0.key"]
    assert past.dtype == present.dtype == np.dtype(ml_dtypes.bfloat16)
    assert (present[:, :, : past.shape[2]] == past).all()
    assert torch.get_default_dtype() == torch.float32


def test_an_input_that_is_missing_and_a_use_outside_are_told() -> None:
    eager = torch_runner(family_loaded("llama"))
    inputs = inputs_of(eager, DECODE)
    with raises(BackendError, "not-entered"):
        eager.run(inputs)
    del inputs["past_key_values.1.value"]
    with eager, raises(BackendError, "wrong-shape", "past_key_values.1.value"):
        eager.run(inputs)


def test_without_a_compiler_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/nonexistent/g++",))
    with (
        torch_runner(family_loaded("llama"), compiled=True) as compiled,
        raises(BackendError, "compiler-missing", "LlamaForCausalLM") as caught,
    ):
        compiled.prepare(inputs_of(compiled, DECODE))
    assert "torch: for eager PyTorch" in caught.value.hint


def checkpoint(folder: Path, **changes: Any) -> Path:
    from exporter.models.loading.model_files import save_checkpoint

    save_checkpoint(family_loaded("llama", **changes), folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def llama(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama as a Hugging Face folder, and its ONNX file."""
    return checkpoint(tmp_path_factory.mktemp("arms")), exported("llama")[1]


def test_two_pytorch_models_are_compared(llama: tuple[Path, Path]) -> None:
    arm = f"torch:{llama[0]}"
    report = compare(arm, arm, SHORT)
    assert report.arms.candidate.backend == "pytorch"
    assert report.accuracy is not None
    assert report.accuracy.kl_divergence == 0.0
    assert report.latency[0].baseline.median_ms > 0


def test_a_reference_is_held_against_the_arm_that_it_is_nearer_to(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, onnx = llama
    report = compare(onnx, onnx, SHORT, references=[f"torch:{folder}"])
    arm = report.arms.references["torch:hf"]
    assert (arm.backend, arm.provider, arm.precision) == ("pytorch", "CPU", "fp32")
    assert arm.kv_cache_bytes_per_token == report.arms.baseline.kv_cache_bytes_per_token
    assert arm.parameters > 0
    assert arm.path == f"torch:{folder}"
    (check,) = report.parity
    assert check.name == "logits of the reference torch:hf against the baseline"
    assert check.passed
    other = f"torch:{checkpoint(tmp_path, seed=1)}"
    (check,) = compare(onnx, onnx, SHORT, references=[other]).parity
    assert not check.passed


def test_what_is_no_pair_or_no_reference_is_refused(
    llama: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, onnx = llama
    small, nothing = checkpoint(tmp_path, vocab_size=96), tmp_path / "nothing"
    for candidate, references, code, named in (
        (f"torch:{folder}", [], "different-kinds", ()),
        (onnx, [f"torch:{small}"], "other-model", (96, 128)),
        (onnx, [f"torch:{nothing}"], "file-missing", ("nothing",)),
    ):
        with raises(ComparisonError, code, *named):
            compare(onnx, candidate, SHORT, references=references)
