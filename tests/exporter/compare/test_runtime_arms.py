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
from exporter.choose.costs.measuring import CostSettings, measure_costs
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.timing import Effort
from exporter.cli import run
from exporter.compare.options import CompareOptions, QualityOptions, TimingOptions
from exporter.compare.session import compare
from exporter.cut.gguf_surgery import cut_gguf
from exporter.errors import ComparisonError, GgufFileError, UsageError
from exporter.gate.keys import key_of
from exporter.report.files import write_reports
from graph_passes import save_model
from tests.raising import raises
from tests.stand_in.llama_cpp import LlamaCpp
from tests.text_graphs import write_tiny_lm, write_tokenizer
from tests.tiny_gguf import TinyGguf
from tests.tiny_graphs import TinySpec, tiny_model

OPTIONS = CompareOptions(
    threads=1,
    prefill_lengths=(4,),
    decode_past_lengths=(6,),
    batches=(2,),
    rounds=2,
    eval_tokens=32,
    eval_sequence_length=16,
    quality=QualityOptions(agreement_prompts=2, agreement_tokens=3, answer_tokens=3),
    timing=TimingOptions(generate=((4, 3),)),
)
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
    with raises(ComparisonError, "one-text-at-a-time", "llama.cpp", "--batch", "--generate"):
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
    accuracy = report.accuracy
    assert accuracy is not None
    assert accuracy.perplexity is not None
    assert accuracy.kl_divergence is not None
    assert accuracy.kl_divergence > 0
    assert accuracy.generation is not None
    assert key_of(report).backend == "llama.cpp"
    assert not stand_in.alive


def test_one_file_against_itself_loses_nothing(
    stand_in: LlamaCpp, files: tuple[Path, Path]
) -> None:
    arm = f"llama.cpp:{files[0]}"
    quick = replace(OPTIONS, decode_past_lengths=(), timing=TimingOptions())
    accuracy = compare(arm, arm, quick).accuracy
    assert accuracy is not None
    assert accuracy.kl_divergence == 0
    assert accuracy.top1_agreement == 1


def test_the_gate_holds_its_report(
    stand_in: LlamaCpp, files: tuple[Path, Path], tmp_path: Path
) -> None:
    quick = replace(OPTIONS, decode_past_lengths=(), timing=TimingOptions(), eval_tokens=160)
    report = compare(*(f"llama.cpp:{file}" for file in files), quick)
    write_reports(report, tmp_path / "report")
    path = str(tmp_path / "report" / "report.json")
    assert run(["check", path, "--max-kl", "1000"]) == 0
    assert run(["check", path, "--max-kl", "0"]) == 1
    assert run(["check", path, "--baseline", path, "--max-size-increase", "1%"]) == 0


def test_arms_of_two_runtimes_are_no_pair(stand_in: LlamaCpp, files: tuple[Path, Path]) -> None:
    with raises(ComparisonError, "different-kinds", "--reference"):
        compare(f"llama.cpp:{files[0]}", files[1], OPTIONS)
    with raises(UsageError, "removed-arm"):
        compare(f"times:{files[0]}", files[1], OPTIONS)
    with raises(GgufFileError, "not-gguf", "cut.onnx"):
        broken = files[0].with_name("cut.onnx")
        broken.write_bytes(b"onnx")
        compare(f"llama.cpp:{files[0]}", f"llama.cpp:{broken}", OPTIONS)
    with raises(UsageError, "onnx-without-engine", "--engine-onnx"):
        compare(*(f"llama.cpp:{file}" for file in files), OPTIONS, onnx=files)


def test_commands_take_it(
    stand_in: LlamaCpp,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arm = f"llama.cpp:{files[1]}"
    assert run(["generate", arm, "one two", "-n", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) <= 3
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(files[1], alone)
    assert run(["generate", f"llama.cpp:{alone}", "one two", "-n", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) <= 3
    (tmp_path / "mine.jsonl").write_text('{"query": "a b", "choices": ["c", "d"], "gold": 0}')
    result = ["evaluate", arm, "--tasks", "mine", "--task-data", str(tmp_path), "--threads", "1"]
    assert run([*result, "-o", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["backend"] == "llama.cpp"
    assert run([*result, "-o", str(files[1])]) == 2
    assert files[1].read_bytes()[:4] == b"GGUF"


def test_costs_on_llama_cpp(stand_in: LlamaCpp, files: tuple[Path, Path], tmp_path: Path) -> None:
    settings = CostSettings(
        AT, threads=1, replacements=("none", "bias"), effort=Effort(seconds=1, rounds=2)
    )
    table = measure_costs(f"llama.cpp:{files[0]}", settings, folder=tmp_path / "work")
    assert table.backend == "llama.cpp"
    members = {(m.kind, m.layer) for group in table.groups for m in group.members}
    assert ("attention", 0) not in members
    assert {("attention", 1), ("mlp", 0)} <= members
    hows = {trial.replacement for group in table.groups for trial in group.trials}
    assert hows == {"none"}  # llama.cpp holds no biases
    assert not stand_in.alive


@pytest.fixture
def graphs(tmp_path: Path) -> tuple[Path, Path]:
    result = []
    for name, layers in (("baseline", (0, 1)), ("candidate", (1,))):
        result.append(write_tiny_lm(tmp_path / name, layers=layers, noise=0.1 * len(result)))
        write_tokenizer(result[-1])
    return result[0], result[1]


@pytest.mark.openvino
def test_openvino_is_an_arm(graphs: tuple[Path, Path]) -> None:
    quick = replace(OPTIONS, timing=TimingOptions())
    report = compare(*(f"openvino:{graph}" for graph in graphs), quick, references=[graphs[0]])
    arms = report.arms
    assert (arms.baseline.backend, arms.candidate.backend) == ("openvino", "openvino")
    assert [arm.backend for arm in arms.references.values()] == ["onnxruntime"]
    assert {(row.phase, row.batch) for row in report.latency} == {
        ("prefill", 2), ("decode", 2),
    }  # fmt: skip
    assert report.accuracy is not None
    assert report.accuracy.perplexity is not None
    (check,) = report.parity
    assert check.passed, check
    assert "openvino" in key_of(report).versions
    on_onnx_runtime = compare(*graphs, quick).accuracy
    assert on_onnx_runtime is not None
    assert report.accuracy.kl_divergence == pytest.approx(on_onnx_runtime.kl_divergence, rel=1e-3)


@pytest.mark.openvino
def test_openvino_generates_no_timed_texts(graphs: tuple[Path, Path]) -> None:
    arms = [f"openvino:{graph}" for graph in graphs]
    with raises(ComparisonError, "", "openvino", "--generate"):
        compare(*arms, OPTIONS)


@pytest.mark.openvino
def test_costs_on_openvino(tmp_path: Path) -> None:
    save_model(tiny_model(TinySpec()), tmp_path / "model.onnx")
    settings = CostSettings(
        AT, threads=1, replacements=("none",), effort=Effort(seconds=1, rounds=2)
    )
    (tmp_path / "config.json").write_text('{"vocab_size": 11}')
    table = measure_costs(f"openvino:{tmp_path}", settings, folder=tmp_path / "work")
    assert table.backend == "openvino"
    assert {trial.replacement for group in table.groups for trial in group.trials} == {"none"}


def test_llama_cpp_stands_beside_graphs(
    stand_in: LlamaCpp, files: tuple[Path, Path], tmp_path: Path
) -> None:
    arms = [
        write_tiny_lm(tmp_path / name, vocabulary=40, layers=layers)
        for name, layers in (("whole", (0, 1)), ("cut", (1,)))
    ]
    quick = replace(OPTIONS, timing=TimingOptions())
    report = compare(*arms, quick, references=[f"llama.cpp:{files[1]}"])
    assert list(report.arms.references) == ["llama.cpp:cut.gguf"]
    assert report.latency[0].references["llama.cpp:cut.gguf"].median_ms > 0
