"""The samples for engines and for Triton run, on tiny models, exported for any runtime."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from exporter.engines.build.engine_set import read_sidecar
from graph_passes import Deletion, prune_graph, save_model
from tests.samples.running import run_sample
from tests.tiny_graphs import TinySpec, tiny_model


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    whole = tiny_model(TinySpec(layers=3))
    cut, _ = prune_graph(whole, [Deletion(1, "attention")])
    for name, model in (("baseline", whole), ("candidate", cut)):
        (tmp_path / "demo" / name).mkdir(parents=True)
        save_model(model, tmp_path / "demo" / name / "model.onnx")
        (tmp_path / "demo" / name / "tokenizer.json").write_text("{}")
    return tmp_path / "demo"


def run(folder: Path, script: str, *arguments: str | Path, **settings: str) -> str:
    done = run_sample(folder, script, *arguments, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.rtx
def test_engines_are_built_ahead_of_time(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what follows there needs a real tokenizer
    out = tmp_path / "out"
    sizes = ["--prompt-range", "1:4:8", "--context-range", "1:4:8"]
    output = run(tmp_path, "05_tensorrt/run.sh", demo, out, "sm80,sm89", *sizes)
    engines = sorted(out.glob("*/*.engine"))
    assert len(engines) == 4
    for engine in engines:
        assert read_sidecar(engine).settings.compute_capabilities == ("sm80", "sm89")
        assert (engine.parent / "tokenizer.json").is_file()
    assert output.count("parses the whole graph") == 2
    assert len(re.findall(r"sublayers cut: 1, sha256 [0-9a-f]{12}\n", output)) == 2
    assert "Built, not run" in output


def test_an_encoder_is_packed_for_triton(tmp_path: Path) -> None:
    repository, encoder = tmp_path / "repository", tmp_path / "encoder" / "pruned.onnx"
    encoder.parent.mkdir()
    save_model(tiny_model(TinySpec(layers=2, cache=False)), encoder)
    output = run(tmp_path, "06_triton/run.sh", encoder, repository)
    assert (repository / "encoder" / "1" / "model.onnx").exists()
    assert 'backend: "onnxruntime"' in output
    assert "dynamic_batching" in output
    line = output.splitlines()[-1]
    assert line.startswith("docker run --rm -p 8000:8000 ")
    assert "--gpus" not in line
    again = run(tmp_path, "06_triton/run.sh", encoder, repository, DEVICE="gpu")
    assert "docker run --rm --gpus all -p 8000:8000 " in again
    assert "KIND_GPU" in again
