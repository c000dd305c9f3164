"""llama.cpp and OpenVINO as arms: rounds, verdicts and accuracy as on ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.choose.costs.measuring import CostSettings, Effort, measure_costs
from exporter.choose.costs.table import RequestShape
from exporter.cli import run
from exporter.compare.options import QualityOptions, TimingOptions
from exporter.compare.session import compare
from exporter.cut.gguf_surgery import cut_gguf
from exporter.errors import ComparisonError, GgufFileError, UsageError
from exporter.gate.keys import key_of
from exporter.report.files import write_reports
from graph_passes import save_model
from tests.compared import accuracy_of, language_models, quick
from tests.present import present
from tests.raising import raises
from tests.stand_in.llama_cpp import LlamaCpp
from tests.text_graphs import write_tiny_lm
from tests.tiny_gguf import TinyGguf
from tests.tiny_graphs import TinySpec, tiny_model

OPTIONS = quick(
    decode_past_lengths=(6,), batches=(2,), timing=TimingOptions(generate=((4, 3),)),
    quality=QualityOptions(agreement_prompts=2, agreement_tokens=3, answer_tokens=3),
)  # fmt: skip
NOT_GENERATING = replace(OPTIONS, timing=TimingOptions())
AT = RequestShape(batch=1, prompt=4, new=3)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> LlamaCpp:
    library = LlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)  # type: ignore[arg-type]
    return library


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A GGUF file, and the same without two attentions."""
    tiny = TinyGguf.llama(layers=4)
    tiny.entries["llama.context_length"] = ("I", 4096)
    tiny.entries["tokenizer.ggml.eos_token_id"] = ("I", 2)
    whole, cut = tiny.write(tmp_path / "whole.gguf"), tmp_path / "cut.gguf"
    plan = [PlannedDeletion(layer=n, kind="attention") for n in (1, 3)]
    cut_gguf(whole, cut, LoadedPlan.of(plan))
    return whole, cut


def test_llama_cpp_is_an_arm(stand_in: LlamaCpp, files: tuple[Path, Path], tmp_path: Path) -> None:
    onnx = write_tiny_lm(tmp_path / "onnx", vocabulary=40)
    arms = [f"llama.cpp:{file}" for file in files]
    with raises(ComparisonError, "nothing-to-time", "llama.cpp", "--batch", "--generate"):
        compare(*arms, OPTIONS)
    report = compare(*arms, replace(OPTIONS, batches=(1,)), references=[onnx])
    result = report.arms
    assert [arm.backend for arm in result.references.values()] == ["onnxruntime"]
    assert (result.baseline.backend, result.candidate.backend) == ("llama.cpp", "llama.cpp")
    assert result.baseline.path == arms[0]
    caches = [arm.kv_cache_bytes_per_token for arm in (result.baseline, result.candidate)]
    assert caches[0] == 2 * caches[1] > 0
    assert [(d.layer, d.kind) for d in report.plan] == [(1, "attention"), (3, "attention")]
    rows = {(row.phase, row.batch) for row in report.latency}
    assert rows == {
        ("prefill", 1), ("decode", 1), ("first_token", 1), ("per_token", 1), ("generate", 1),
    }  # fmt: skip
    accuracy = present(report.accuracy)
    assert accuracy.perplexity is not None
    assert present(accuracy.kl_divergence) > 0
    assert accuracy.prompts is not None
    assert key_of(report).backend == "llama.cpp"
    assert not stand_in.alive


def test_one_file_against_itself_loses_nothing_and_the_gate_holds_a_report(
    stand_in: LlamaCpp, files: tuple[Path, Path], tmp_path: Path
) -> None:
    options = replace(NOT_GENERATING, decode_past_lengths=(), eval_tokens=160)
    whole, cut = (f"llama.cpp:{file}" for file in files)
    same = accuracy_of(whole, whole, options=options)
    assert (same.kl_divergence, same.top1_agreement) == (0, 1)
    write_reports(compare(whole, cut, options), tmp_path / "report")
    path = str(tmp_path / "report" / "report.json")
    for limits, code in (
        (["--max-kl", "1000"], 0),
        (["--max-kl", "0"], 1),
        (["--baseline", path, "--max-size-increase", "1%"], 0),
    ):
        assert run(["check", path, *limits]) == code


def test_arms_of_two_runtimes_are_no_pair(stand_in: LlamaCpp, files: tuple[Path, Path]) -> None:
    whole, cut = files
    broken = whole.with_name("cut.onnx")
    broken.write_bytes(b"onnx")
    with raises(ComparisonError, "different-kinds", "--reference"):
        compare(f"llama.cpp:{whole}", cut, OPTIONS)
    with raises(GgufFileError, "not-gguf", "cut.onnx"):
        compare(f"llama.cpp:{whole}", f"llama.cpp:{broken}", OPTIONS)
    with raises(UsageError, "onnx-without-engine", "--engine-onnx"):
        compare(*(f"llama.cpp:{file}" for file in files), OPTIONS, onnx=files)


def test_commands_take_it(
    stand_in: LlamaCpp,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(files[1], alone)
    for place in (files[1], alone):
        call = ["generate", f"llama.cpp:{place}", "one two", "-n", "3", "--json"]
        assert run(call) == 0
        assert len(json.loads(capsys.readouterr().out)["token_ids"]) <= 3
    (tmp_path / "mine.jsonl").write_text('{"query": "a b", "choices": ["c", "d"], "gold": 0}')
    call = ["evaluate", f"llama.cpp:{files[1]}", "--tasks", "mine", "--task-data", str(tmp_path)]
    assert run([*call, "--threads", "1", "-o", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["backend"] == "llama.cpp"
    assert run([*call, "-o", str(files[1])]) == 2
    assert files[1].read_bytes()[:4] == b"GGUF"


@pytest.fixture
def graphs(tmp_path: Path) -> tuple[Path, Path]:
    return language_models(tmp_path / "graphs")


@pytest.mark.openvino
def test_openvino_is_an_arm(graphs: tuple[Path, Path]) -> None:
    names = [f"openvino:{graph}" for graph in graphs]
    report = compare(*names, NOT_GENERATING, references=[graphs[0]])
    arms = report.arms
    assert (arms.baseline.backend, arms.candidate.backend) == ("openvino", "openvino")
    assert [arm.backend for arm in arms.references.values()] == ["onnxruntime"]
    rows = {(row.phase, row.batch) for row in report.latency}
    assert rows == {("prefill", 2), ("decode", 2)}
    accuracy = present(report.accuracy)
    by_onnx_runtime = accuracy_of(*graphs, options=NOT_GENERATING)
    assert accuracy.perplexity is not None
    assert accuracy.kl_divergence == pytest.approx(by_onnx_runtime.kl_divergence, rel=1e-3)
    (check,) = report.parity
    assert check.passed, check
    assert "openvino" in key_of(report).versions
    with raises(ComparisonError, "nothing-to-time", "openvino", "--generate"):
        compare(*names, OPTIONS)


@pytest.mark.openvino
def test_costs_on_openvino(tmp_path: Path) -> None:
    save_model(tiny_model(TinySpec()), tmp_path / "model.onnx")
    settings = CostSettings(AT, threads=1, variants=Effort(seconds=1, rounds=2))
    (tmp_path / "config.json").write_text('{"vocab_size": 11}')
    table = measure_costs(f"openvino:{tmp_path}", settings, folder=tmp_path / "work")
    assert table.backend == "openvino"
    assert len(table.variants) == 2


def test_llama_cpp_stands_beside_graphs(
    stand_in: LlamaCpp, files: tuple[Path, Path], tmp_path: Path
) -> None:
    arms = [
        write_tiny_lm(tmp_path / name, vocabulary=40, layers=layers)
        for name, layers in (("whole", (0, 1)), ("cut", (1,)))
    ]
    report = compare(*arms, NOT_GENERATING, references=[f"llama.cpp:{files[1]}"])
    assert list(report.arms.references) == ["llama.cpp:cut.gguf"]
    assert report.latency[0].references["llama.cpp:cut.gguf"].median_ms > 0
