"""What both arms say to prompts, in reports and printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import Accuracy, ComparisonReport
from exporter.cli import run
from exporter.compare.evaluation import questions
from exporter.compare.options import CompareOptions, QualityOptions
from exporter.compare.session import compare
from exporter.errors import BackendError, ComparisonError, TextSourceError
from tests.made_reports import as_markdown, as_page, as_text
from tests.raising import ends_in, raises
from tests.text_graphs import WORDS, write_tiny_lm, write_tokenizer

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("no_timing")
TEMPLATE = "the list {{ messages[0]['content'] }} is"
CHAT = {"chat_template.jinja": TEMPLATE}


def arms(folder: Path, files: dict[str, str] | None = None, **config: Any) -> list[Path]:
    """A language model and the same with other weights, each with these files beside it."""
    for name, noise in (("a", 0.0), ("b", 1.0)):
        write_tiny_lm(folder / name, noise=noise)
        write_tokenizer(folder / name)
        (folder / name / "config.json").write_text(json.dumps({"eos_token_id": 0} | config))
        for file, text in (files or {}).items():
            (folder / name / file).write_text(text)
    return [folder / "a", folder / "b"]


def encoders(folder: Path) -> list[Path]:
    made = [
        write_tiny_lm(folder / name, layers=(), output="last_hidden_state", noise=noise)
        for name, noise in (("a", 0.0), ("b", 0.5))
    ]
    for item in made:
        write_tokenizer(item, ["guitar", "song", "tax", "law", "bread", "oven", "a", "the"])
    return made


def options(**quality: Any) -> CompareOptions:
    few = {"agreement_prompts": 0, "answer_tokens": 5} | quality
    return CompareOptions(eval_tokens=96, prefill_lengths=(4,), quality=QualityOptions(**few))


def accuracy(folders: list[Path], **quality: Any) -> Accuracy:
    result = compare(*folders, options(**quality)).accuracy
    assert result is not None
    return result


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("chat", [True, False])
def test_built_in_prompts_are_answered_by_both(tmp_path: Path, chat: bool) -> None:
    answers = accuracy(arms(tmp_path, CHAT), chat=chat).answers
    assert answers is not None
    assert (answers.chat, answers.source, answers.new_tokens) == (chat, "built in", 5)
    prompts = questions(None)
    assert [answer.prompt for answer in answers.answers] == [
        *(prompts.texts if chat else prompts.openings)
    ]
    assert 3 <= len(answers.answers) <= 5
    assert any(answer.baseline != answer.candidate for answer in answers.answers)
    assert not answers.left_out


def test_the_template_decides_what_the_model_reads(tmp_path: Path) -> None:
    result = {"prompts": written(tmp_path / "p.txt", "of that\n")}
    (tmp_path / "chat").mkdir()
    (tmp_path / "plain").mkdir()
    chat = accuracy(arms(tmp_path / "chat", CHAT), chat=True, **result).answers
    plain = accuracy(arms(tmp_path / "plain"), **result).answers
    (tmp_path / "p.txt").write_text("the list of that is")
    same = accuracy([tmp_path / "plain" / name for name in "ab"], **result).answers
    assert chat is not None
    assert plain is not None
    assert same is not None
    assert chat.answers[0].baseline == same.answers[0].baseline != plain.answers[0].baseline
    assert (chat.answers[0].prompt, same.answers[0].prompt) == ("of that", "the list of that is")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "the value\n\n  if that \n"),
        (
            "p.jsonl",
            '{"prompt": "the value", "more": "longer than the prompt"}\n{"q": "if that"}\n',
        ),
    ],
)
def test_the_user_s_prompts_are_a_line_each(tmp_path: Path, name: str, text: str) -> None:
    path = written(tmp_path / name, text)
    answers = accuracy(arms(tmp_path), prompts=path).answers
    assert answers is not None
    assert [answer.prompt for answer in answers.answers] == ["the value", "if that"]
    assert answers.source == str(path)


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("p.txt", "\n  \n", "no-text"),
        ("p.jsonl", "", "no-text"),
        ("p.jsonl", '{"prompt": 3}', "not-a-string"),
        ("p.jsonl", "prompt", "not-json"),
    ],
)
def test_a_file_without_prompts_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, code: str
) -> None:
    monkeypatch.delattr("exporter.compare.accuracy.compare_predictions")
    with raises(TextSourceError, code, name):
        accuracy(arms(tmp_path), prompts=written(tmp_path / name, text))


def test_an_answer_says_whether_it_was_cut(tmp_path: Path) -> None:
    (tmp_path / "on").mkdir()
    (tmp_path / "end").mkdir()
    prompts = written(tmp_path / "p.txt", "the value")
    cut = accuracy(arms(tmp_path / "on", eos_token_id=99), prompts=prompts).answers
    every = list(range(32))
    ended = accuracy(arms(tmp_path / "end", eos_token_id=every), prompts=prompts).answers
    assert cut is not None
    assert ended is not None
    assert not cut.answers[0].baseline.ended
    assert cut.answers[0].baseline.text
    assert ended.answers[0].baseline.ended
    assert not ended.answers[0].baseline.text


@pytest.mark.parametrize(
    ("files", "config", "reason"),
    [
        ({}, {"max_position_embeddings": 96}, "96"),
        ({"chat_template.jinja": "{% for"}, {}, "chat_template.jinja"),
        ({"chat_template.jinja": ""}, {}, "prompt 1"),
    ],
)
def test_what_can_t_be_answered_is_left_out_with_a_reason_or_refused_if_it_was_asked_for(
    tmp_path: Path, files: dict[str, str], config: dict[str, int], reason: str
) -> None:
    folders = arms(tmp_path, files, **config)
    result = accuracy(folders, answer_tokens=90, chat=bool(files))
    assert result.answers is not None
    assert result.answers.answers == []
    assert reason in result.answers.left_out
    assert result.top1_agreement is not None
    own = written(tmp_path / "p.txt", "the value " * 4)
    with raises(ComparisonError, "prompts-unanswered", "--prompts", own, reason):
        accuracy(folders, answer_tokens=90, prompts=own, chat=bool(files))


def test_without_a_tokenizer_one_line_says_so(tmp_path: Path) -> None:
    folders = arms(tmp_path)
    for folder in folders:
        (folder / "tokenizer.json").unlink()
    report = compare(*folders, options())
    assert report.accuracy is not None
    assert report.accuracy.answers is not None
    assert "tokenizer.json" in report.accuracy.answers.left_out
    (line,) = (
        as_markdown(report).split("## What the models say\n\n")[1].split("\n\n## ")[0].splitlines()
    )
    assert "tokenizer.json" in line
    assert "Sample answers" not in as_text(report)


def test_nobody_has_to_ask(tmp_path: Path) -> None:
    report = compare(*arms(tmp_path), options(answer_tokens=0))
    assert report.accuracy is not None
    assert report.accuracy.answers is None
    assert "What the models say" not in as_markdown(report)


def test_a_tokenizer_of_another_model_s_template_is_left_out(tmp_path: Path) -> None:
    folders = arms(tmp_path, {"chat_template.jinja": "beyond"})
    for folder in folders:
        write_tokenizer(folder, [*WORDS, *(f"w{number}" for number in range(20)), "beyond"])
    answers = accuracy(folders, chat=True).answers
    assert answers is not None
    assert answers.left_out
    assert not answers.answers


def test_the_command_shows_them_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(tmp_path / "text.txt", " ".join(np.random.default_rng(0).choice(WORDS, 900)))
    prompts = written(tmp_path / "p.txt", "the value")
    call = ["compare", *map(str, arms(tmp_path, CHAT)), "-o", str(tmp_path / "out"), "-q"]
    more = ["--eval-text", str(text), "--eval-tokens", "96", "--prompts", str(prompts)]
    keys = written(tmp_path / "c.yaml", "{agreement_prompts: 0, answer_tokens: 3}")
    assert run([*call, *more, "--config", str(keys)]) == 0
    report = ComparisonReport.read(tmp_path / "out" / "report.json")
    assert report.accuracy is not None
    assert report.accuracy.answers is not None
    (result,) = report.accuracy.answers.answers
    words = result.candidate.text.split()
    assert 0 < len(words) <= 3
    for item in (capsys.readouterr().out, as_markdown(report), as_page(report)):
        assert "the value" in item
        assert " ".join(words) in item
    with ends_in(TextSourceError, "no-text", prompts):
        prompts.write_text("")
        assert run([*call, *more]) == 2


def test_generate_asks_in_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(arms(tmp_path, CHAT)[0])
    call = ["generate", model, "-n", "4", "--threads", "1", "--json", "-q"]
    assert run([*call, "of that", "--chat"]) == 0
    chat = json.loads(capsys.readouterr().out)["token_ids"]
    assert run([*call, "the list of that is"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == chat
    assert run([*call, "of that"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] != chat


def test_generate_makes_no_template_up(tmp_path: Path) -> None:
    model = arms(tmp_path)[0]
    with ends_in(BackendError, "no-chat-template", "--chat", "--tokenizer", model):
        assert run(["generate", str(model), "of that", "--chat"]) == 2
    (tmp_path / "elsewhere").mkdir()
    write_tokenizer(tmp_path / "elsewhere")
    written(tmp_path / "elsewhere" / "chat_template.jinja", TEMPLATE)
    other = ["--tokenizer", str(tmp_path / "elsewhere"), "-n", "2", "--threads", "1"]
    assert run(["generate", str(model), "of that", "--chat", *other]) == 0


def test_an_encoder_can_t_be_asked(tmp_path: Path) -> None:
    model, other = encoders(tmp_path)
    prompts = written(tmp_path / "p.txt", "the value")
    with raises(ComparisonError, "prompts-unanswered", prompts):
        compare(model, other, options(prompts=prompts))
    with ends_in(BackendError, "no-chat-template"):
        assert run(["generate", str(model), "the guitar", "--chat"]) == 2
    written(model / "chat_template.jinja", TEMPLATE)
    with ends_in(BackendError, "no-kv-cache"):
        assert run(["generate", str(model), "the guitar", "--chat"]) == 2
