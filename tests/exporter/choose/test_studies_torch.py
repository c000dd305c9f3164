"""Pruning at several depths, on a tiny model."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exporter.cli as command_line
from exporter.artifacts import DepthsReport, ImportanceReport
from exporter.errors import CalibrationError, ComparisonError, PlanError, ScoringError
from tests.raising import ends_in, raises, tells
from tests.reading import Page

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

LAYERS, LENGTH = 3, 24
QUICK = {
    "eval_tokens": 96, "eval_sequence_length": LENGTH, "prefill": [8], "decode_past": [8],
    "rounds": 2, "threads": 1, "agreement_prompts": 0, "samples": 4,
    "sequence_length": LENGTH, "heal_calibration": ["pydoc"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a Llama of three layers, with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.text_graphs import write_tokenizer

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for step in (200, 1000):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        place = folder / f"checkpoint-{step}"
        model.save_pretrained(place)
        write_tokenizer(place)
        PreTrainedTokenizerFast.from_pretrained(place).save_pretrained(place)
    return folder


@pytest.fixture(scope="module")
def loaded(run: Path) -> Any:
    from exporter.models.loading.model_source import load_model

    return load_model(str(run / "checkpoint-1000"))


@pytest.fixture(scope="module")
def scores(loaded: Any) -> ImportanceReport:
    from exporter.score import ScoreOptions, score

    return score(loaded, ScoreOptions(calibration=("pydoc",), samples=6, sequence_length=LENGTH))


def silenced(model: Any, branches: Iterable[tuple[int, str]]) -> Any:
    """A copy whose branches end in zeros: another way to leave them out."""
    cut = copy.deepcopy(model)
    for layer, kind in branches:
        block = cut.model.layers[layer]
        last = block.self_attn.o_proj if kind == "attention" else block.mlp.down_proj
        last.weight.data.zero_()
    return cut


def plain(model: Any, whole: Any, ids: Any) -> tuple[float, float]:
    """Perplexity and KL divergence, written out in float64."""
    with torch.no_grad():
        mine, its = (m(ids).logits.double()[:, :-1].log_softmax(-1) for m in (model, whole))
    losses = -mine.gather(-1, ids[:, 1:, None])
    return float(losses.mean().exp()), float((its.exp() * (its - mine)).sum(-1).mean())


def test_each_cell_is_what_the_model_without_the_branches_gives(
    loaded: Any, scores: ImportanceReport
) -> None:
    from exporter.choose.depths import DepthOptions, measure_depths
    from exporter.models.texts.calibration import calibration_text

    options = DepthOptions(numbers=(2, 1), tokens=5 * LENGTH, sequence_length=LENGTH, batch_size=2)
    report = measure_depths(loaded, scores, options, importance_sha256="0" * 64)
    assert [(c.way, c.number) for c in report.cells] == [
        (way, number) for way in ("attention", "mlp", "block", "joint") for number in (1, 2)
    ]
    text = calibration_text(loaded, "pydoc", samples=5, sequence_length=LENGTH, part="evaluation")
    assert report.text == text.ref
    ids = torch.from_numpy(text.input_ids)
    total = sum(p.numel() for p in loaded.model.parameters())
    layer = loaded.model.model.layers[0]
    sizes = {
        "attention": sum(p.numel() for p in layer.self_attn.parameters()),
        "mlp": sum(p.numel() for p in layer.mlp.parameters()),
    }
    for cell in report.cells:
        kinds = {"block": ("attention", "mlp")}
        names = [(d.layer, k) for d in cell.deletions for k in kinds.get(d.kind, (d.kind,))]
        perplexity, kl = plain(silenced(loaded.model, names), loaded.model, ids)
        assert cell.damage is not None
        # float32 logits against float64 sums of them.
        assert cell.damage.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert cell.damage.kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert cell.damage.perplexity_ratio == pytest.approx(
            perplexity / report.baseline_perplexity, rel=1e-5
        )
        low, high = cell.damage.perplexity_ratio_ci95 or (0.0, 0.0)
        assert low < cell.damage.perplexity_ratio < high
        assert cell.parameters_removed == pytest.approx(sum(sizes[k] for _, k in names) / total)
    chosen = sorted((s for s in scores.scores if s.kind == "mlp"), key=lambda s: s.score)
    assert [d.layer for d in report.of_way("mlp")[1].deletions] == [s.layer for s in chosen[:2]]


def test_what_the_model_does_not_have_is_a_cell_that_says_so(
    run: Path, scores: ImportanceReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "scores.json", tmp_path / "depths.json"
    kept = [score for score in scores.scores if score.kind != "block"]
    scores.model_copy(update={"scores": kept}).write(file)
    (tmp_path / "short.yaml").write_text(f"eval_sequence_length: {LENGTH}\n")
    call = [
        "depths", str(run / "checkpoint-1000"), "--importance", str(file), "-n", "1,4",
        "-o", str(out), "--eval-tokens", "48", "--config", str(tmp_path / "short.yaml"),
    ]  # fmt: skip
    assert command_line.run(call) == 0
    report = DepthsReport.read(out)
    refused = {(cell.way, cell.number): cell.refused for cell in report.cells if cell.refused}
    assert set(refused) == {("attention", 4), ("mlp", 4), ("block", 1), ("block", 4)}
    assert tells(str(refused["mlp", 4]), 3)
    assert "block" in str(refused["block", 1])
    assert report.of_way("joint")[1].damage is not None
    printed = capsys.readouterr().out
    assert "block of 1:" in printed
    assert "| joint | 1 |" in out.with_suffix(".md").read_text()
    page = Page(out.with_suffix(".html").read_text())
    assert "Pruning at several depths" in page.words
    assert not out.with_name("depths.json.journal").exists()


@pytest.mark.long
def test_a_model_alone_is_answered_with_what_may_be_dropped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporter.artifacts import PruningPlan
    from exporter.choose import depths_answer as answer
    from exporter.choose import depths_answer as speeds

    monkeypatch.setattr(speeds, "_TIMED_SECONDS", 0.2)
    monkeypatch.setattr(speeds, "find_spec", lambda _name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "short.yaml").write_text(f"eval_sequence_length: {LENGTH}\n")
    out = tmp_path / "depths.json"
    call = [
        "depths", str(run / "checkpoint-1000"), "-o", str(out), "--eval-tokens", "96",
        "--at", "batch=1,prompt=16,new=4", "--config", str(tmp_path / "short.yaml"),
    ]  # fmt: skip
    assert command_line.run([*call, "--at-most", "10000%"]) == 0
    report = DepthsReport.read(out)
    assert [(cell.way, cell.number) for cell in report.cells] == [
        ("attention", 1), ("attention", 2), ("block", 2),
    ]  # fmt: skip
    assert report.answer is not None
    assert report.answer.other_text.source.startswith("self")
    assert (report.answer.backend, report.answer.int8) == ("pytorch", None)
    assert "genai" in report.answer.no_int8
    for cell in report.cells:
        assert cell.other is not None
        assert (cell.healed is None) == bool(cell.not_healed)
        # A busy machine may tell times that can't be.
        assert set(cell.speedups) in (set(), {"prefill", "decode", "request"})
    assert any(cell.healed is not None for cell in report.cells)
    best = answer.recommended(report.cells, 100.0)
    assert report.recommended == best
    plan = out.with_suffix(".plan.json")
    assert plan.exists() == (best is not None)
    if best is not None:
        assert PruningPlan.read(plan).deletions == best.deletions
        assert PruningPlan.read(plan).chosen_on == [*report.calibration.texts, report.text]
    assert "How much" not in capsys.readouterr().err
    # What was measured is not measured again, and text of one's own takes the model's place.
    text = tmp_path / "own.txt"
    text.write_text("the list of the value is a class and the call of " * 60)
    assert command_line.run([*call, "--other-text", str(text)]) == 0
    again = DepthsReport.read(out)
    assert again.answer is not None
    assert again.answer.other_text.source == str(text)
    for one, other in zip(report.cells, again.cells, strict=True):
        assert one.damage == other.damage


@pytest.mark.parametrize("text", ["pydoc", pytest.param("docstrings", marks=pytest.mark.long)])
def test_the_command_that_is_printed_judges_on_other_text(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:  # fmt: skip
    from exporter.artifacts import ComparisonReport, DropAnswer
    from exporter.choose.depths import measure_depths
    from exporter.cli import studies as depths

    model, quick = tmp_path / "my model", tmp_path / "quick.yaml"
    model.symlink_to(run / "checkpoint-1000")
    monkeypatch.chdir(tmp_path)

    def measured(loaded: Any, scores: Any, options: Any, **given: Any) -> DepthsReport:
        plain = replace(options, recommend=False, numbers=(1,), ways=("attention",))
        report = measure_depths(loaded, scores, plain, **given)
        answer = DropAnswer(
            other_text=report.text, other_baseline_perplexity=1.0, fitted_on=report.text,
            most_increase=0.02, way="attention", number=1,
        )  # fmt: skip
        (cell,) = report.cells
        healed = cell.model_copy(update={"healed": cell.damage})
        return report.model_copy(update={"answer": answer, "cells": [healed]})

    monkeypatch.setattr(depths, "measure_depths", measured)
    quick.write_text(f"eval_sequence_length: {LENGTH}\n")
    call = ["depths", str(model), "-o", "my depths.json", "--eval-tokens", "96"]
    assert command_line.run([*call, "--eval-text", text, "--config", str(quick)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("depthcut "))
    words = shlex.split(line)[1:]
    quick.write_text(json.dumps(QUICK))
    with ends_in(ComparisonError, "same-text"):
        assert command_line.run([*words[:-1], text, "--config", str(quick)]) == 2
    assert command_line.run([*words, "--config", str(quick)]) in (0, 1, 3)
    assert ComparisonReport.read(tmp_path / "out" / "report.json").accuracy is not None


def test_a_model_without_next_tokens_is_told_what_answers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.cli import studies as depths
    from tests.tiny_models import tiny_loaded

    monkeypatch.setattr(depths, "load_model", lambda *_, **__: tiny_loaded("bert"))
    monkeypatch.setattr(depths, "score", None)  # it would be the first work
    with ends_in(ScoringError, "no-next-token", "depthcut export"):
        assert command_line.run(["depths", "bert", "-o", str(tmp_path / "depths.json")]) == 2


@pytest.mark.long
@pytest.mark.genai
def test_int8_stands_beside_the_cuts_where_a_graph_can_be_written(
    loaded: Any, scores: ImportanceReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its loss is that of the graph that `quantize` writes, run by ONNX Runtime."""
    from exporter.choose import depths_answer as speeds
    from exporter.choose.costs.request_shape import RequestShape
    from exporter.choose.costs.timing import Effort
    from exporter.choose.depths import DepthOptions, measure_depths

    monkeypatch.setattr(speeds, "_TOGETHER", Effort(seconds=0.5, reload=False))
    options = DepthOptions(
        numbers=(1,), ways=("attention",), recommend=True, tokens=96, sequence_length=LENGTH,
        at=RequestShape(prompt=16, new=4),
    )  # fmt: skip
    report = measure_depths(loaded, scores, options, importance_sha256="", kept=tmp_path)
    assert report.answer is not None
    int8 = report.answer.int8
    assert int8 is not None
    assert (report.answer.backend, report.answer.no_int8) == ("onnxruntime", "")
    assert 0.2 < int8.bytes_removed < 0.8
    assert 0 < abs(int8.perplexity_ratio - 1) < 0.05  # activations are rounded, too
    assert 0 < abs(int8.other_perplexity_ratio - 1) < 0.05
    assert set(int8.speedups) == {"prefill", "decode", "request"}
    # What was measured is not measured again.
    monkeypatch.setattr(speeds, "_timed", None)
    again = measure_depths(loaded, scores, options, importance_sha256="", kept=tmp_path)
    assert again.answer is not None
    assert again.answer.int8 == int8


def test_a_cut_is_recommended_on_one_half_of_a_text_and_reported_on_the_other(
    loaded: Any, scores: ImportanceReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.choose import depths
    from exporter.choose import depths_answer as answer

    parts: list[Any] = []
    held_out = depths._held_out
    monkeypatch.setattr(
        depths, "_held_out", lambda *told: parts.extend(held_out(*told)) or tuple(parts)
    )
    monkeypatch.setattr(answer, "_LEAST_SPEEDUP", 1.0)
    options = depths.DepthOptions(
        numbers=(1,), recommend=True, tokens=240, sequence_length=LENGTH, most_increase=1e6
    )
    report = depths.measure_depths(loaded, scores, options, importance_sha256="0" * 64)
    choosing, reporting = parts
    assert len(choosing.input_ids) + len(reporting.input_ids) == 240 // LENGTH
    assert {*choosing.documents}.isdisjoint(reporting.documents)
    result, best = report.answer, report.recommended
    assert best is not None
    assert result is not None
    assert (report.text, result.reported_text) == (choosing.ref, reporting.ref)
    assert result.looks == 2 * sum(cell.damage is not None for cell in report.cells)
    assert result.reported is not None
    on_the_first = [item.perplexity for item in (best.damage, best.healed) if item is not None]
    assert result.reported.perplexity not in on_the_first
    for cell in report.cells:
        if cell.damage is not None:
            assert cell.damage.perplexity_ratio_ci95 is not None
            assert cell.damage.perplexity_ratio_most is not None
            assert cell.damage.perplexity_ratio_most > cell.damage.perplexity_ratio_ci95[1]


def test_a_fold_lowers_the_damage_that_it_is_fitted_to(
    loaded: Any, scores: ImportanceReport
) -> None:
    """The healed figures are those of changed weights, and the model is as before afterwards."""
    from exporter.choose.depths import DepthOptions, measure_depths

    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    options = DepthOptions(
        numbers=(1,), ways=("attention",), recommend=True, tokens=96, sequence_length=LENGTH
    )
    (cell,) = measure_depths(loaded, scores, options, importance_sha256="0" * 64).cells
    assert cell.healed is not None
    assert cell.damage is not None
    assert cell.healed.perplexity != cell.damage.perplexity
    assert cell.speedups == {}  # the model is too short for the usual request
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_interrupted_measurement_goes_on(
    loaded: Any, scores: ImportanceReport, tmp_path: Path, monkeypatch: Any
) -> None:
    from exporter.choose.depths import DepthOptions, measure_depths
    from exporter.models.ablation.meter import DamageMeter

    options = DepthOptions(
        numbers=(1,), ways=("attention", "mlp"), tokens=48, sequence_length=LENGTH
    )
    measure, result = DamageMeter.measure_many, []

    def counted(self: Any, cut: Any, others: Any, progress: Any) -> Any:
        result.append([sorted(kind for _, kind in other) for other in others])
        if len(result) == 2:
            raise KeyboardInterrupt
        return measure(self, cut, others, progress)

    monkeypatch.setattr(DamageMeter, "measure_many", counted)
    with pytest.raises(KeyboardInterrupt):
        measure_depths(loaded, scores, options, importance_sha256="", kept=tmp_path)
    again = measure_depths(loaded, scores, options, importance_sha256="", kept=tmp_path)
    assert result == [[["attention"]], [["mlp"]], [["mlp"]]]
    monkeypatch.undo()
    fresh = measure_depths(loaded, scores, options, importance_sha256="")
    # A batch's whole model is run once more where others are known: the same sums.
    for one, other in zip(again.cells, fresh.cells, strict=True):
        assert one.damage is not None
        assert other.damage is not None
        assert one.damage.kl == pytest.approx(other.damage.kl, rel=1e-6)


def test_what_was_measured_in_another_dtype_is_measured_again(
    run: Path, loaded: Any, scores: ImportanceReport, tmp_path: Path
) -> None:
    from exporter.choose.depths import DepthOptions, measure_depths
    from exporter.models.loading.model_source import load_model

    options = DepthOptions(numbers=(1,), ways=("mlp",), tokens=48, sequence_length=LENGTH)
    narrow = load_model(str(run / "checkpoint-1000"), dtype="bfloat16")
    wide = measure_depths(loaded, scores, options, importance_sha256="", kept=tmp_path)
    report = measure_depths(narrow, scores, options, importance_sha256="", kept=tmp_path)
    assert report.baseline_perplexity != wide.baseline_perplexity


def test_depths_are_judged_on_other_text_and_by_own_scores(
    loaded: Any, scores: ImportanceReport, tmp_path: Path
) -> None:
    from exporter.choose.depths import DepthOptions, measure_depths
    from exporter.score import ScoreOptions, score

    text = tmp_path / "own.txt"
    text.write_text("the list of the value is a class and the call of " * 60)
    options = DepthOptions(numbers=(1,), text=str(text), tokens=48, sequence_length=LENGTH)
    score_options = ScoreOptions(calibration=(str(text),), samples=4, sequence_length=LENGTH)
    own = score(loaded, score_options)
    with raises(CalibrationError, "same-text", "own.txt", "--eval-text"):
        measure_depths(loaded, own, options, importance_sha256="")
    stranger = scores.model.model_copy(update={"sha256": "b" * 64})
    with raises(PlanError, "another-model", "bbbbbbbbbbbb"):
        measure_depths(
            loaded, scores.model_copy(update={"model": stranger}), options, importance_sha256=""
        )


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = ["list", "value", "class", "call", "name"]
    lines = [
        json.dumps(
            {
                "query": f"the {words[rng.integers(5)]} of the",
                "choices": [f" {word}" for word in rng.permutation(words)[:3]],
                "gold": int(rng.integers(3)),
            }
        )
        for _ in range(12)
    ]
    (tmp_path / "words.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_tasks_are_those_of_the_cut_model(
    loaded: Any, scores: ImportanceReport, task_data: Path
) -> None:
    import dataclasses

    from exporter.choose.depths import DepthOptions, compared_tasks, measure_depths
    from exporter.compare.options import TaskOptions

    choice = TaskOptions(("words",), task_data)
    options = DepthOptions(
        numbers=(2,), ways=("mlp",), tokens=48, sequence_length=LENGTH,
        tasks=choice,
    )  # fmt: skip
    (cell,) = measure_depths(loaded, scores, options, importance_sha256="").cells
    names = [(deletion.layer, "mlp") for deletion in cell.deletions]
    other = dataclasses.replace(loaded, model=silenced(loaded.model, names))
    result = compared_tasks(other, choice, {"whole": {}})["whole"]
    assert [task.metric for task in cell.tasks] == [task.metric for task in result]
    for task, alone in zip(cell.tasks, result, strict=True):
        assert task.candidate == alone.baseline
        assert task.items == 12
    whole = compared_tasks(loaded, choice, {"whole": {}})["whole"]
    assert [task.baseline for task in cell.tasks] == [task.baseline for task in whole]


def test_interrupted_tasks_go_on(
    loaded: Any, task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.choose import depths as task_scores
    from exporter.compare.options import TaskOptions
    from exporter.compare.tasks.choosing import score_tasks
    from exporter.models.ablation.branch_replacements import NOTHING

    choice, calls = TaskOptions(("words",), task_data), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_tasks(*arguments, **named)

    monkeypatch.setattr(task_scores, "score_tasks", counted)
    cuts: Any = {n: {(n, "mlp"): NOTHING} for n in range(2)} | {"again": {(0, "mlp"): NOTHING}}
    kept = tmp_path / "tasks.jsonl"
    with pytest.raises(KeyboardInterrupt):
        task_scores.compared_tasks(loaded, choice, cuts, kept=kept)
    with kept.open("a") as file:
        file.write('{"name": "ml')
    again = task_scores.compared_tasks(loaded, choice, cuts, kept=kept)
    assert len(calls) == 5  # whole, first, cut short; whole, second
    assert again == task_scores.compared_tasks(loaded, choice, cuts, kept=kept)
    assert len(calls) == 5
    assert again["again"] == again[0]
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "9" if name == "depthcut" else installed(name)
    )
    task_scores.compared_tasks(loaded, choice, {0: cuts[0]}, kept=kept)
    assert len(calls) == 7  # of other versions; whole and first
    other = TaskOptions(("words",), task_data, task_limit=2)
    few = task_scores.compared_tasks(loaded, other, {0: cuts[0]}, kept=kept)
    assert few[0][0].items == 2
