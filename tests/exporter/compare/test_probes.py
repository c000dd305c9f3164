"""Probes: items made from a seed, asked of both arms; and what keeps a model from being asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import WORDS, write_tiny_lm, write_tokenizer

from exporter.artifacts import Accuracy, ComparisonReport, EvaluationReport
from exporter.cli import run
from exporter.compare.latency import Timed
from exporter.compare.options import CompareOptions, QualityOptions, TaskOptions
from exporter.compare.session import compare
from exporter.compare.tasks.evaluation import (
    PROBES,
    evaluate_model,
    make_probes,
    score_probes,
    why_unaskable,
)
from exporter.compare.tasks.items import Item
from exporter.engines.runners.base import Capabilities
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, TaskError
from exporter.models.model_folder import ModelFolder
from exporter.options import build
from graph_passes import save_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

ITEMS = 40
VOCABULARY = 256


def items(name: str) -> Iterator[tuple[str, list[str], str]]:
    """Of a probe: the text, the answers and the right one of each item."""
    (probe,) = [each for each in make_probes(ITEMS) if each.name == name]
    for item in probe.items:
        answers = [answer.removeprefix(" ") for _, answer in item.pairs]
        assert len({context for context, _ in item.pairs}) == 1
        assert len(set(answers)) == len(answers) == 4
        yield item.pairs[0][0], answers, answers[item.gold]


def test_the_same_seed_makes_the_same_items() -> None:
    first = make_probes(ITEMS)
    assert [probe.name for probe in first] == ["arithmetic", "brackets", "copy", "lookup"]
    assert make_probes(ITEMS) == first
    for probe, fewer, other in zip(first, make_probes(5), make_probes(ITEMS, seed=1), strict=True):
        assert fewer.items == probe.items[:5]
        assert other.items != probe.items
        assert len({other.sha256, fewer.sha256, probe.sha256}) == 3
        assert {item.gold for item in probe.items} == {0, 1, 2, 3}


def test_sums_are_right_and_wrong_ones_as_long() -> None:
    for text, answers, right in items("arithmetic"):
        *examples, (first, second, none) = [
            re.match(r"(\d+) \+ (\d+) = ?(\d*)", f"{line} ").groups()  # type: ignore[union-attr]
            for line in text.split("\n")
        ]
        assert none == ""
        assert int(first) + int(second) == int(right)
        assert all(int(a) + int(b) == int(sum_) for a, b, sum_ in examples)
        assert {answer[:-1] for answer in answers} == {right[:-1]}


def test_brackets_are_balanced_once_all_are_closed() -> None:
    closing = {"(": ")", "[": "]", "{": "}", "<": ">"}
    for text, answers, right in items("brackets"):
        *examples, last = text.split("\n")
        for line in (*examples, last):
            unclosed: list[str] = []
            for bracket in line.split():
                if bracket in closing:
                    unclosed.append(closing[bracket])
                else:
                    assert unclosed.pop() == bracket
            assert (unclosed[-1:] == [right]) == (line is last)
        assert set(answers) == set(closing.values())


def test_a_list_goes_on_as_it_did_and_a_key_has_its_value() -> None:
    for text, answers, right in items("copy"):
        words, begun = (part.strip(".").split() for part in text.split("\n"))
        assert words[: len(begun)] == begun
        assert words[len(begun)] == right
        assert set(answers) < set(words)
    for text, answers, right in items("lookup"):
        *lines, asked = text.split("\n")
        table = dict(line.split(": ") for line in lines)
        assert table[asked.removesuffix(":")] == right
        assert set(answers) == set(table.values())


def words_of(item: Item) -> list[str]:
    return [word for pair in item.pairs for word in re.findall(r"\w+|[^\w\s]+", "".join(pair))]


def write_model(folder: Path, words: Any = None, **how: Any) -> Path:
    """A tiny decoder that knows all words of the probes, or others."""
    asked = [item for probe in make_probes(ITEMS) for item in probe.items]
    known = [word for item in asked for word in words_of(item)]
    write_tiny_lm(folder, vocabulary=VOCABULARY, **how)
    write_tokenizer(folder, [*dict.fromkeys((*WORDS, *known))] if words is None else words)
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    return folder


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("arms")
    return write_model(folder / "a"), write_model(folder / "b", layers=(1,), noise=1.0)


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.compare.session.time_all", lambda *_: Timed())


def compared(arms: tuple[Path, Path], out: Path, *options: str) -> Accuracy:
    call = ["compare", *map(str, arms), "-o", str(out), "-q", "--eval-tokens", "64"]
    assert run([*call, "--agreement-prompts", "0", "--threads", "1", *options]) == 0
    found = ComparisonReport.read(out / "report.json").accuracy
    assert found is not None
    return found


@pytest.mark.usefixtures("no_timing")
def test_both_arms_are_asked_the_same_items(arms: tuple[Path, Path], tmp_path: Path) -> None:
    found = compared(arms, tmp_path / "out", "--probes", str(ITEMS))
    told = [(each.task, each.metric, each.items) for each in found.probes]
    assert told == [(name, metric, ITEMS) for name in PROBES for metric in ("acc", "log_prob")]
    assert found.probes_left_out == ""
    assert found.tasks == []
    for each in found.probes:
        low, high = each.difference.ci95
        assert low < each.difference.value < high
        assert each.difference.value == pytest.approx(each.candidate - each.baseline, abs=1e-12)
        assert (each.mcnemar_p is None) == (each.metric == "log_prob")
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="probes"' in page
    assert "## Probes" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("no_timing")
def test_the_same_model_twice_differs_nowhere(arms: tuple[Path, Path], tmp_path: Path) -> None:
    found = compared((arms[0], arms[0]), tmp_path / "out", "--probes", "12")
    for each in found.probes:
        low, high = each.difference.ci95
        assert each.difference.value == 0
        assert low < 0 < high


@pytest.mark.parametrize("none", ["none", "0"])
@pytest.mark.usefixtures("no_timing")
def test_without_probes_none_is_asked_and_the_report_says_so(
    arms: tuple[Path, Path], tmp_path: Path, none: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("exporter.compare.task_answers.score_probes")
    found = compared(arms, tmp_path / "out", "--probes", none)
    assert found.probes == []
    page = (tmp_path / "out" / "report.md").read_text()
    assert found.probes_left_out
    assert found.probes_left_out in page
    assert "## Probes" not in page


def test_the_number_of_items_is_an_option() -> None:
    assert QualityOptions().probes == 100
    assert build(QualityOptions, {"probes": "none"}).probes == 0
    assert build(QualityOptions, {"probes": 7}).probes == 7


def test_log_prob_is_that_of_the_right_answer(arms: tuple[Path, Path]) -> None:
    folder = ModelFolder.beside(arms[0] / "model.onnx", arms[0])
    probes = make_probes(6)
    with OnnxRuntimeRunner(folder.onnx, threads=1) as runner:
        scores = score_probes(probes, runner, folder, vocabulary=VOCABULARY)
    for probe, found in zip(probes, scores, strict=True):
        golds = [item.gold for item in probe.items]
        pairs = [*zip(found.log_likelihoods, golds, strict=True)]
        assert found.metrics["log_prob"].tolist() == [values[gold] for values, gold in pairs]
        best = [max(values) == values[gold] for values, gold in pairs]
        assert found.metrics["acc"].tolist() == best


@pytest.mark.usefixtures("no_timing")
def test_answers_of_an_interrupted_comparison_are_kept(
    arms: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def asked(probes: int) -> CompareOptions:
        quality = QualityOptions(probes=probes, agreement_prompts=0)
        return CompareOptions(eval_tokens=64, threads=1, quality=quality)

    with monkeypatch.context() as patch:
        patch.setattr("exporter.compare.session.time_all", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(*arms, asked(5), resume=tmp_path)
    lines = (tmp_path / ".depthcut" / "comparison.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines]
    assert names[-2:] == ["probes of the baseline", "probes of the candidate"]
    monkeypatch.setattr("exporter.compare.task_answers.score_probes", stop)
    accuracy = compare(*arms, asked(5), resume=tmp_path).accuracy
    assert accuracy is not None
    assert {each.items for each in accuracy.probes} == {5}
    with pytest.raises(KeyboardInterrupt):
        compare(*arms, asked(6), resume=tmp_path)


class Refusing(OnnxRuntimeRunner):
    """An engine whose profiles are too short."""

    def refuse_shapes(self, shapes: Any, **_: Any) -> None:
        if shapes["input_ids"][1] > 8:
            raise BackendError("no profile holds them.")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"output": "last_hidden_state"}, "logits"),
        ({"causal": False}, "next token"),
        ({"tokenizer": None}, "tokenizer.json"),
        ({"words": WORDS}, "same tokens"),
        ({"words": [*WORDS, "0"], "config": {"max_position_embeddings": 9}}, "same tokens"),
        ({"config": {"max_position_embeddings": 9}}, "9 positions"),
        ({"config": {"max_position_embeddings": 64}}, ""),
        ({"kind": Refusing, "shapes": "profiles"}, "no profile holds them"),
        ({"shapes": "compiled"}, "compile"),
    ],
)
def test_what_keeps_a_model_from_being_asked(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    how = {"output": change["output"]} if "output" in change else {}
    home = write_model(tmp_path, change.get("words"), **how)
    tokenizer = change.get("tokenizer", home / "tokenizer.json")
    folder = ModelFolder(home / "model.onnx", tokenizer, change.get("config", {}))
    with change.get("kind", OnnxRuntimeRunner)(folder.onnx, threads=1) as runner:
        runner.capabilities = Capabilities(shapes=change.get("shapes", "any"))
        causal = change.get("causal", True)
        why = why_unaskable(make_probes(ITEMS), runner, folder, causal=causal)
    assert told in why
    assert bool(why) == bool(told)


@pytest.mark.usefixtures("no_timing")
def test_the_report_of_an_encoder_says_that_it_was_not_asked(tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        save_model(tiny_model(TinySpec(cache=False)), folder / "model.onnx")
    found = compared(folders, tmp_path / "out")
    assert found.probes == []
    assert "next token" in found.probes_left_out
    assert found.probes_left_out in (tmp_path / "out" / "report.md").read_text()


def test_one_model_is_asked_alone(arms: tuple[Path, Path], tmp_path: Path) -> None:
    call = ["evaluate", str(arms[0]), "-q", "--threads", "1", "-o", str(tmp_path / "scores.json")]
    assert run([*call, "--probes", "5"]) == 0
    scores = EvaluationReport.read(tmp_path / "scores.json").scores
    assert [(each.task, each.metric) for each in scores] == [
        (name, metric) for name in PROBES for metric in ("acc", "log_prob")
    ]
    assert {len(each.items) for each in scores} == {5}
    assert run([*call, "--probes", "none"]) == 2
    other = write_model(tmp_path / "other", WORDS)
    with raises(TaskError, "no-probes"):
        evaluate_model(other, TaskOptions(probes=5), threads=1)
