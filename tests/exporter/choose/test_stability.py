"""Series of rankings held side by side, as data, Markdown and a page. No PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from html_page import Page
from made_series import FIRST, SECOND, THIRD, training, write_scores
from scipy.stats import kendalltau, spearmanr

import exporter.cli as command_line
from exporter.artifacts import CalibrationRef, StabilityReport
from exporter.choose.studies.naming import checkpoint_labels, step_of, text_labels
from exporter.choose.studies.stability import repeatability, stability_of_files
from exporter.errors import ArtifactError, ScoringError, UsageError
from exporter.report.html import page as render
from exporter.report.sections.stability import stability_document, step_word
from tests.raising import ends_in, raises


def test_a_training_is_held_side_by_side(tmp_path: Path) -> None:
    report = stability_of_files(training(tmp_path))
    assert report.over == "checkpoints"
    assert report.is_ordered
    assert [(p.label, p.step) for p in report.points] == [
        ("checkpoint-200", 200), ("checkpoint-1000", 1000), ("checkpoint-3000", 3000),
    ]  # fmt: skip
    attention = report.kinds[0]
    assert attention.kind == "attention"
    assert attention.scores == [FIRST, SECOND, THIRD]
    pairs = {(a.first, a.second): a for a in attention.agreements}
    assert list(pairs) == [(0, 1), (0, 2), (1, 2)]
    # The same library on the same six numbers.
    assert pairs[1, 2].spearman == pytest.approx(spearmanr(SECOND, THIRD).statistic, abs=1e-12)
    assert pairs[0, 2].kendall == pytest.approx(kendalltau(FIRST, THIRD).statistic, abs=1e-12)
    assert attention.between(2, 0) is pairs[0, 2]
    # The four lowest: {2, 1, 5, 3}, {1, 2, 3, 5}, {1, 2, 5, 3}.
    assert pairs[0, 1].shared_first == {4: 4}
    assert attention.always_first == {4: [1, 2, 3, 5]}
    assert len(report.made_from) == 3


def test_layers_that_leave_the_first_are_not_always_there(tmp_path: Path) -> None:
    files = training(tmp_path)
    late = [0.1, 0.2, 0.3, 0.4, 0.5, 0.9]  # {0, 1, 2, 3}
    files.append(write_scores(tmp_path / "late.json", late, model="run/checkpoint-4000", sha="d"))
    report = stability_of_files(files)
    assert report.kinds[0].always_first == {4: [1, 2, 3]}
    assert report.kinds[0].between(0, 3).shared_first == {4: 3}


def test_one_model_over_texts_has_no_order(tmp_path: Path) -> None:
    files = [
        write_scores(tmp_path / f"{n}.json", values, text=text)
        for n, (values, text) in enumerate(((FIRST, "here/wiki.txt"), (SECOND, "code.jsonl")))
    ]
    report = stability_of_files(files)
    assert report.over == "texts"
    assert not report.is_ordered
    assert [(p.label, p.step) for p in report.points] == [("wiki.txt", None), ("code.jsonl", None)]


def test_amounts_of_one_text_are_an_axis(tmp_path: Path) -> None:
    files = [
        write_scores(tmp_path / f"{n}.json", values, samples=n)
        for n, values in ((4, FIRST), (16, SECOND))
    ]
    report = stability_of_files(files)
    assert (report.over, report.is_ordered) == ("texts", True)
    assert [(p.label, p.step) for p in report.points] == [("4 x 8", 32), ("16 x 8", 128)]
    back = stability_of_files(files[::-1])
    assert not back.is_ordered


def test_what_can_not_be_told_apart_is_refused(tmp_path: Path) -> None:
    one = write_scores(tmp_path / "a.json", FIRST, model="m1", sha="a", text="self (seed 0)")
    two = write_scores(
        tmp_path / "b.json", SECOND, model="m2", sha="b", text="self (text, seed 12)"
    )
    with raises(ScoringError, "text-and-model-differ", one, two, "--calibration pydoc"):
        stability_of_files([one, two])


@pytest.mark.parametrize(
    ("other", "differ"),
    [
        ({"values": FIRST[:5]}, (6, 5)),
        ({"values": FIRST, "architecture": "B"}, ("A", "B")),
    ],
)
def test_models_of_other_shapes_are_refused_by_name(
    tmp_path: Path, other: dict[str, object], differ: tuple[object, ...]
) -> None:
    one = write_scores(tmp_path / "a.json", FIRST, model="m1")
    two = write_scores(tmp_path / "b.json", model="m2", sha="b", **other)  # type: ignore[arg-type]
    with raises(ScoringError, "other-shapes", "m1", one, "m2", two, *differ):
        stability_of_files([one, two])


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    one, two, _ = training(tmp_path)
    with raises(ScoringError, "one-file"):
        stability_of_files([one])
    with raises(ScoringError, "named-twice"):
        stability_of_files([one, one])
    with raises(ArtifactError, "not-scored", "kl"):
        stability_of_files([one, two], metric="kl")
    content = json.loads(two.read_text())
    content["scores"].pop()
    two.write_text(json.dumps(content))
    with raises(ScoringError, "scored-in-one", "mlp 5", one, two):
        stability_of_files([one, two])
    content["scores"][0]["score"] = float("nan")
    two.write_text(json.dumps(content))
    one.write_text(json.dumps(content))
    with raises(ScoringError, "not-finite", "attention 0"):
        stability_of_files([one, two])


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("run/checkpoint-1000", 1000), ("step_2000", 2000), ("global_step300", 300),
        ("iter_0000400/", 400), ("map-neo-500B", 5e11), ("pythia-70m-step3000", 3000),
        ("step3k", 3000), ("checkpoint-10-merged", 10), ("7b/final", None), ("epoch=3", 3),
        ("checkpoint-500", 500), ("global_step2000", 2000), ("epoch-3", 3), ("500B", 5e11),
        ("epoch=2-step=500.ckpt", 500), ("step500-epoch2", 500), ("epoch3_step500", 500),
        ("step1000-tokens4B", 1000), ("tokens-3B", 3e9), ("ckpt_1e4", 10000),
        ("llama-7b-50B-tokens", 5e10), ("100M_tokens", 1e8), ("llama-50B-tied", None),
        ("step-1,000", 1000), ("checkpoint-1000-bf16", 1000), ("500-fp16", 500), ("00100", 100),
        ("model_00010.safetensors", 10), ("model1000.gguf", 1000), ("sft-3", 3), ("run.2", 2),
        # versions, dates, sizes, types, seeds, hashes: none of them is a step
        ("v2-final", None), ("final-model-v1.2", None), ("checkpoint-v2-500", 500),
        ("2024-01-05", None), ("20240105_103000", None), ("2024-01-05T10-00", None),
        ("checkpoint-2024-01-05", None), ("run-2024-01-05-500", 500), ("olmo-7b-1000", 1000),
        ("llama-3.2-1b", None), ("llama3.2-1b-300", 300), ("Llama-2-7b-hf", None),
        ("pythia-70m", None), ("model-int8", None), ("seed42", None), ("a1b2c3", None),
        ("7e12345", None), ("transit5-300", 300), ("final", None),
    ],
)  # fmt: skip
def test_steps_are_read_from_names(name: str, step: float | None) -> None:
    assert step_of(name) == step


def test_labels_differ() -> None:
    assert checkpoint_labels(["a/checkpoint-1", "a/checkpoint-2"]) == [
        "checkpoint-1", "checkpoint-2",
    ]  # fmt: skip
    assert checkpoint_labels(["a/best", "b/best"]) == ["a/best", "b/best"]
    refs = [
        CalibrationRef(source=s, samples=n, sequence_length=8, tokens=8 * n, sha256="0" * 64)
        for s, n in (("pydoc (half)", 4), ("x/wiki.txt", 4), ("pydoc (half)", 16))
    ]
    assert text_labels(refs) == ["pydoc, 4 x 8", "wiki.txt, 4 x 8", "pydoc, 16 x 8"]
    assert text_labels(refs[:2]) == ["pydoc", "wiki.txt"]
    assert text_labels([refs[0], refs[0]]) == ["pydoc (1)", "pydoc (2)"]
    mixture = refs[0].model_copy(update={"source": "no name", "mixture": refs[:2]})
    assert text_labels([mixture]) == ["pydoc+wiki.txt"]


@pytest.mark.parametrize(
    ("step", "word"), [(500, "500"), (1000, "1k"), (1500, "1.5k"), (143000, "143k"), (1234, "1234")]
)
def test_steps_are_short_on_an_axis(step: float, word: str) -> None:
    assert step_word(step) == word


def test_the_command_writes_data_tables_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in training(tmp_path)]
    out = tmp_path / "out" / "found.json"
    assert command_line.run(["score", "--compare", *files, "-o", str(out)]) == 0
    report = StabilityReport.read(out)
    assert report.points[1].file == files[1]
    told = capsys.readouterr().out
    assert "attentions  " in told
    assert str(out.with_suffix(".html")) in told
    text = out.with_suffix(".md").read_text()
    assert "| checkpoint-1000 |" in text
    assert "attentions among the first" not in text  # 4 of 6 layers are no choice
    page = Page(out.with_suffix(".html").read_text())
    assert "Importance over training" in page.words
    cells = [a for tag, a in page.elements if tag == "rect" and "rx" not in a]
    assert len(cells) == 2 * 3 * 6
    assert "among the 1 most" not in page.words
    assert command_line.run(["score", "--compare", *files, "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "stability_report"


def test_the_command_refuses_what_would_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in training(tmp_path)]
    with ends_in(UsageError, "overwrites-input", files[0]):
        assert command_line.run(["score", "--compare", *files, "-o", files[0]]) == 2
    assert command_line.run(["score", "--compare", *files, "-o", str(tmp_path / "x.html")]) == 2
    assert "x.json" in capsys.readouterr().err
    assert command_line.run(["score", "--compare"]) == 2
    assert command_line.run(["score", "--compare", files[0]]) == 2


def test_a_page_over_texts_has_the_pairs(tmp_path: Path) -> None:
    hostile = "<b>&\"'.txt"
    files = [
        write_scores(tmp_path / f"{n}.json", values, text=text)
        for n, (values, text) in enumerate(((FIRST, hostile), (SECOND, "b.txt"), (THIRD, "cc.txt")))
    ]
    report = stability_of_files(files)
    text = render([stability_document(report)])
    page = Page(text)
    assert "<b>" not in text
    value = f"{report.kinds[0].between(0, 1).spearman:.2f}"
    assert page.words.count(value) >= 2
    assert "Agreement of each pair of texts" in page.words


def test_equal_scores_have_no_correlation(tmp_path: Path) -> None:
    files = [
        write_scores(tmp_path / f"{sha}.json", [0.5] * 6, model=f"step-{n}", sha=sha)
        for n, sha in enumerate("ab")
    ]
    report = stability_of_files(files)
    assert report.kinds[0].agreements[0].spearman is None
    assert "too few sublayers apart" in render([stability_document(report)])


def test_chance_is_told_from_standard_errors(tmp_path: Path) -> None:
    files = [
        write_scores(tmp_path / f"{n}.json", FIRST, samples=n, std_error=error)
        for n, error in ((4, 1e-9), (8, 0.1), (16, 1e3))
    ]
    attention, mlp = stability_of_files(files).kinds
    sure, middling, none = attention.repeatability
    assert sure == 1.0
    assert middling is not None
    assert 0.5 < middling < 0.95
    assert none == pytest.approx(0.0, abs=0.1)  # 500 draws of six: a tenth is four of their errors
    assert mlp.repeatability == [None, None, None]


def test_chance_is_what_two_draws_give(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scores, errors = np.linspace(0.1, 1.0, 12), np.full(12, 0.15)
    drawn = scores + errors * rng.standard_normal((400, 2, 12))
    told = repeatability(scores, errors.tolist())
    found = np.mean([spearmanr(*pair).statistic for pair in drawn])
    # Both are means of hundreds of draws, each of a spread of about 0.1.
    assert told == pytest.approx(found, abs=0.03)
    assert repeatability(scores, [*errors.tolist()[:-1], None]) is None
    assert repeatability(scores, [*errors.tolist()[:-1], float("nan")]) is None


def test_equal_scores_without_errors_have_no_order_to_repeat() -> None:
    assert repeatability(np.full(4, 0.5), [0.0] * 4) is None
    assert repeatability(np.arange(4.0), [0.0] * 4) == 1.0
