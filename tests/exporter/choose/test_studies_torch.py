"""Pruning at several depths, on a tiny model."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import exporter
import exporter.cli as command_line
from exporter.artifacts import DepthsReport, ImportanceReport, PruningPlan
from exporter.choose import depths
from exporter.choose.budgets import limits
from exporter.choose.costs.measuring import Effort
from exporter.choose.costs.table import RequestShape
from exporter.compare.options import TaskOptions
from exporter.errors import CalibrationError, HealingError, PlanError, ScoringError
from exporter.models.loading.model_source import load_model
from tests.made_tables import made_table
from tests.raising import ends_in, raises, tells
from tests.reading import Page, in_file
from tests.text_graphs import write_tokenizer
from tests.tiny_models import tiny_loaded, tiny_model

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from exporter.export.forms.targets import write_form  # noqa: E402
from exporter.models.ablation.meter import CutMeter  # noqa: E402
from exporter.models.texts.calibration import calibration_text  # noqa: E402
from exporter.score.options import ScoreOptions  # noqa: E402
from exporter.score.scoring import score  # noqa: E402

LAYERS, LENGTH = 3, 24
SHORT = f"eval_sequence_length: {LENGTH}"
OWN = "the list of the value is a class and the call of " * 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("run") / "checkpoint-1000"
    # Traced as the folder of the tests of the road.
    form = {"max_position_embeddings": 128, "pad_token_id": None}
    tiny_model("llama", **form).save_pretrained(folder)
    write_tokenizer(folder)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    return load_model(str(checkpoint))


@pytest.fixture(scope="module")
def scores(loaded: Any) -> ImportanceReport:
    return score(loaded, ScoreOptions(calibration=("pydoc",), samples=6, sequence_length=LENGTH))


IN_INT8 = depths._Study.in_int8


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depths, "_INT8_EFFORT", Effort(seconds=0.2, reload=False))
    monkeypatch.setattr(depths._Study, "in_int8", lambda *_: {})


@pytest.fixture
def measured(loaded: Any, scores: ImportanceReport) -> Any:
    def made(scores: Any = scores, loaded: Any = loaded, kept: Any = None, **options: Any) -> Any:
        given = {"numbers": (1,), "tokens": 48, "sequence_length": LENGTH, **options}
        asked = depths.DepthOptions(**given)
        return depths.measure_depths(loaded, scores, asked, importance_sha256="0" * 64, kept=kept)

    return made


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
    loaded: Any, scores: ImportanceReport, measured: Any
) -> None:
    report = measured(numbers=(2, 1), tokens=5 * LENGTH, batch_size=2)
    assert [(c.way, c.number) for c in report.cells] == [
        (way, number) for way in ("attention", "mlp", "block", "joint") for number in (1, 2)
    ]
    text = calibration_text(loaded, "pydoc", samples=5, sequence_length=LENGTH, part="evaluation")
    text, _ = text.in_turn()  # the other half is for what is recommended
    assert report.text == text.ref
    ids = torch.from_numpy(text.input_ids)
    total = sum(p.numel() for p in loaded.model.parameters())
    layer = loaded.model.model.layers[0]
    parts = {"attention": layer.self_attn, "mlp": layer.mlp}
    sizes = {kind: sum(p.numel() for p in part.parameters()) for kind, part in parts.items()}
    for cell in report.cells:
        kinds = {"block": ("attention", "mlp")}
        names = [(d.layer, k) for d in cell.deletions for k in kinds.get(d.kind, (d.kind,))]
        perplexity, kl = plain(silenced(loaded.model, names), loaded.model, ids)
        damage, ratio = cell.damage, perplexity / report.baseline_perplexity
        # float32 logits against float64 sums of them.
        assert damage.kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert damage.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
        low, high = damage.perplexity_ratio_ci95
        assert low < damage.perplexity_ratio < high
        assert cell.parameters_removed == pytest.approx(sum(sizes[k] for _, k in names) / total)
    chosen = sorted((s for s in scores.scores if s.kind == "mlp"), key=lambda s: s.score)
    assert [d.layer for d in report.cells[3].deletions] == [s.layer for s in chosen[:2]]


def test_what_the_model_does_not_have_is_a_cell_that_says_so(
    checkpoint: Path, scores: ImportanceReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "scores.json", tmp_path / "depths.json"
    kept = [score for score in scores.scores if score.kind != "block"]
    scores.model_copy(update={"scores": kept}).write(file)
    call = ["depths", str(checkpoint), "--importance", str(file), "-n", "1,4", "-o", str(out)]
    call += ["--eval-tokens", "48", SHORT]
    assert command_line.run(in_file(tmp_path, call)) == 0
    report = DepthsReport.read(out)
    refused = {(cell.way, cell.number): cell.refused for cell in report.cells if cell.refused}
    assert set(refused) == {("attention", 4), ("mlp", 4), ("block", 1), ("block", 4)}
    assert tells(str(refused["mlp", 4]), 3)
    assert "block" in str(refused["block", 1])
    assert report.cells[-1].damage is not None
    assert "block of 1:" in capsys.readouterr().out
    assert "| 1 attentions and MLPs |" in out.with_suffix(".md").read_text()
    page = Page(out.with_suffix(".html").read_text())
    assert "Pruning at several depths" in page.words
    assert not out.with_name("depths.json.journal").exists()


@pytest.mark.long
def test_a_model_alone_is_answered_with_what_may_be_dropped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "depths.json"
    call = ["depths", str(checkpoint), "-o", str(out), "--eval-tokens", "96"]
    words = in_file(tmp_path, ["--at", "batch=1,prompt=16,new=4", SHORT])
    assert command_line.run([*call, *words, "--at-most", "10000%"]) == 0
    report = DepthsReport.read(out)
    assert [(cell.way, cell.number) for cell in report.cells] == [
        ("attention", 1), ("attention", 2), ("block", 2),
    ]  # fmt: skip
    assert (report.backend, report.request) == ("pytorch", "batch=1,prompt=16,new=4")
    for cell in report.cells:
        assert (cell.healed is None) == bool(cell.not_healed)
    assert any(cell.healed is not None for cell in report.cells)
    best = depths.recommended(report.cells, 100.0)
    assert report.recommended == best
    plan = out.with_suffix(".plan.json")
    assert plan.exists() == (best is not None)
    if best is not None:
        assert PruningPlan.read(plan).deletions == best.deletions
        assert PruningPlan.read(plan).chosen_on == [*report.calibration.texts, report.text]
    assert "How much" not in capsys.readouterr().err
    # Costs that were measured before are taken, and no damage is measured again.
    costs, names = tmp_path / "graph.json", itertools.product(range(3), ("attention", "mlp"))
    made_table({name: {"none": 20.0} for name in names}).write(costs)
    words = in_file(tmp_path, [f"costs: {costs}", SHORT])
    assert command_line.run([*call, *words, "--at-most", "10000%"]) == 0
    again = DepthsReport.read(out)
    assert [cell.damage for cell in again.cells] == [cell.damage for cell in report.cells]
    assert [cell.speedup for cell in again.cells] == pytest.approx([1.25, 1 / 0.6, 5.0])


def test_a_model_without_next_tokens_is_told_what_answers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "load_model", lambda *_, **__: tiny_loaded("bert"))
    monkeypatch.setattr(exporter, "score_model", None)  # it would be the first work
    with ends_in(ScoringError, "no-next-token", "depthcut export"):
        assert command_line.run(["depths", "bert", "-o", str(tmp_path / "depths.json")]) == 2


@pytest.mark.parametrize("heals", [True, False])
def test_a_cut_is_recommended_on_one_half_of_a_text_and_reported_on_the_other(
    measured: Any, monkeypatch: pytest.MonkeyPatch, heals: bool
) -> None:
    parts: list[Any] = []
    if not heals:
        nothing = Mock(side_effect=HealingError("", code="nothing-to-fold-into"))
        monkeypatch.setattr(depths._Study, "folded", nothing)
    held_out = depths._held_out
    monkeypatch.setattr(
        depths, "_held_out", lambda *told: parts.extend(held_out(*told)) or tuple(parts)
    )
    monkeypatch.setattr(depths, "_LEAST_SPEEDUP", 1.0)
    report = measured(numbers=None, tokens=240, most_increase=1e6)
    choosing, reporting = parts
    assert len(choosing.input_ids) + len(reporting.input_ids) == 240 // LENGTH
    assert {*choosing.documents}.isdisjoint(reporting.documents)
    best = report.recommended
    assert (best.healed is not None) is heals
    assert (report.text, report.reported_text) == (choosing.ref, reporting.ref)
    damages = [cell.damage for cell in report.cells if cell.damage is not None]
    assert report.looks == 2 * len(damages)
    on_the_first = [
        item.perplexity_ratio for item in (best.damage, best.healed) if item is not None
    ]
    assert report.reported.perplexity_ratio not in on_the_first
    assert all(item.perplexity_ratio_most > item.perplexity_ratio_ci95[1] for item in damages)


def test_a_fold_lowers_the_damage_that_it_is_fitted_to(loaded: Any, measured: Any) -> None:
    """The healed figures are those of changed weights, and the model is as before afterwards."""
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    (cell,) = measured(ways=("attention",), tokens=96, most_increase=1e6).cells
    assert cell.healed.perplexity_ratio != cell.damage.perplexity_ratio
    assert cell.speedup is None  # the model is too short for the usual request
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.fixture(scope="module")
def graph(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_form(loaded, tmp_path_factory.mktemp("graph"))[0]


@pytest.mark.parametrize("most", [pytest.param(1e6, marks=pytest.mark.long), 1e-9])
def test_int8_stands_beside_the_whole_and_the_recommended_cut(
    measured: Any, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float
) -> None:
    def written(loaded: Any, folder: Path, **named: Any) -> Any:
        if folder.name == "whole":
            return shutil.copytree(graph.parent, folder, dirs_exist_ok=True) / graph.name, None
        return write_form(loaded, folder)

    monkeypatch.setattr(depths, "write_form", written)
    monkeypatch.setattr(depths._Study, "in_int8", IN_INT8)
    monkeypatch.setattr(depths, "_LEAST_SPEEDUP", 0.0)
    asked = {"ways": ("mlp",), "tokens": 240, "at": RequestShape(prompt=8, new=2)}
    report = measured(most_increase=most, kept=tmp_path, **asked)
    assert not report.no_int8
    (cell,), (whole, *others) = report.cells, report.int8
    assert whole.deletions == []
    assert 0 < whole.damage.kl < cell.damage.kl / 2
    low, high = whole.damage.perplexity_ratio_ci95
    assert low < whole.damage.perplexity_ratio < high
    assert [row.deletions for row in others] == ([cell.deletions] if most > 1 else [])
    for row in others:  # of the cut as it is recommended, on the text that chose nothing
        near, far = (abs(row.damage.kl - item.kl) for item in (report.reported, cell.least))
        assert near < far
        assert row.damage.kl == pytest.approx(report.reported.kl, rel=0.2)
        assert row.damage.perplexity_ratio == pytest.approx(
            report.reported.perplexity_ratio, abs=0.03
        )
        assert row.bytes_removed > whole.bytes_removed
    assert report.reported_text.tokens < 240
    for row in report.int8:
        assert 0 < row.bytes_removed < 1
        assert row.speedup.ci95[0] < row.speedup.ratio < row.speedup.ci95[1]
    monkeypatch.setattr(depths, "quantize_file", Mock(side_effect=AssertionError))
    assert measured(most_increase=most, kept=tmp_path, **asked).int8 == report.int8


def test_an_interrupted_measurement_goes_on(
    loaded: Any, measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, result = CutMeter.measure_many, []
    asked: dict[str, Any] = {"ways": ("attention", "mlp")}

    def counted(self: Any, cut: Any, others: Any, progress: Any) -> Any:
        if others:  # a fold alone is measured without
            result.append([sorted(kind for _, kind in other) for other in others])
        if len(result) == 2:
            raise KeyboardInterrupt
        return measure(self, cut, others, progress)

    with monkeypatch.context() as patch:
        patch.setattr(CutMeter, "measure_many", counted)
        patch.setattr(limits, "_AT_ONCE", 1)
        with pytest.raises(KeyboardInterrupt):
            measured(kept=tmp_path, **asked)
        again = measured(kept=tmp_path, **asked)
    assert result == [[["attention"]], [["mlp"]], [["mlp"]]]
    fresh = measured(**asked)
    # A batch's whole model is run once more where others are known: the same sums.
    for one, other in zip(again.cells, fresh.cells, strict=True):
        assert one.damage.kl == pytest.approx(other.damage.kl, rel=1e-6)
    narrow = load_model(str(loaded.path), dtype="bfloat16")  # nothing of another type is kept
    other = measured(loaded=narrow, kept=tmp_path, ways=("mlp",))
    assert other.baseline_perplexity != fresh.baseline_perplexity


def test_depths_are_judged_on_other_text_and_by_own_scores(
    loaded: Any, scores: ImportanceReport, measured: Any, tmp_path: Path
) -> None:
    text = tmp_path / "own.txt"
    text.write_text(OWN)
    options = ScoreOptions(calibration=(str(text),), samples=4, sequence_length=LENGTH)
    with raises(CalibrationError, "same-text", "own.txt", "--eval-text"):
        measured(score(loaded, options), text=str(text))
    stranger = scores.model.model_copy(update={"sha256": "b" * 64})
    with raises(PlanError, "another-model", "bbbbbbbbbbbb"):
        measured(scores.model_copy(update={"model": stranger}), text=str(text))


@pytest.fixture
def task(tmp_path: Path) -> TaskOptions:
    rng, words = np.random.default_rng(0), ["list", "value", "class", "call", "name"]
    lines = [
        {
            "query": f"the {words[rng.integers(5)]} of the",
            "choices": [f" {word}" for word in rng.permutation(words)[:3]],
            "gold": int(rng.integers(3)),
        }
        for _ in range(12)
    ]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return TaskOptions(("words",), tmp_path)


def test_tasks_are_those_of_the_cut_model(loaded: Any, measured: Any, task: TaskOptions) -> None:
    (cell,) = measured(numbers=(2,), ways=("mlp",), tasks=task).cells
    names = [(deletion.layer, "mlp") for deletion in cell.deletions]
    cut, whole = (
        depths.compared_tasks(replace(loaded, model=model), task, {"whole": {}})["whole"]
        for model in (silenced(loaded.model, names), loaded.model)
    )
    assert [row.metric for row in cell.tasks] == [row.metric for row in cut]
    assert [row.candidate for row in cell.tasks] == [row.baseline for row in cut]
    assert [row.baseline for row in cell.tasks] == [row.baseline for row in whole]
    assert {row.items for row in cell.tasks} == {12}
