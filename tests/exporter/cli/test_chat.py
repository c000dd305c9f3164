"""Talking to models, and what is asked on a terminal when a command has ended."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from exporter.artifacts import DepthsReport, PruningPlan
from exporter.cli import asking, run, studies
from exporter.cli.chat import _names
from exporter.cli.console import ConsoleProgress
from exporter.cli.export import ExportCall, _next_steps
from exporter.engines.decoding.conversation import Conversation
from exporter.engines.decoding.text_model import TextModel
from exporter.errors import BackendError
from exporter.options import build
from exporter.report.terminal import cut_lines
from tests.made_reports import full_report, gate_report
from tests.made_tables import made_answer
from tests.raising import raises
from tests.stand_in.decoders import Scripted
from tests.text_graphs import WORDS, write_tiny_lm, write_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }} {% endfor %}"
NUMBER = {word: number for number, word in enumerate(WORDS, 1)}
ANSWER = [NUMBER[word] for word in ("list", "of", "value")]


class Room(Scripted):
    """Says the same answer to every prompt, and has room for so many positions."""

    def __init__(self, room: int) -> None:
        super().__init__(ANSWER)
        self.room, self.prompts = room, list[list[int]]()

    def refuse_unfit(self, batch: int, prompt: int, new_tokens: int) -> None:
        if prompt + new_tokens > self.room:
            raise BackendError("No room.", code="cache-too-short")

    def prefill(self, token_ids: Any, *, context: int | None = None) -> Any:
        self.at = 0
        self.prompts.append(token_ids[0].tolist())
        return self.step(token_ids)

    def step(self, token_ids: Any) -> Any:
        self.at += 1
        return np.eye(64, dtype=np.float32)[[ANSWER[self.at - 1]]]


def talk(folder: Path, *, template: str | None = TEMPLATE, room: int = 1_000) -> Conversation:
    pytest.importorskip("tokenizers")
    write_tokenizer(folder, [*WORDS, "u", "a:", ":"])
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Conversation(TextModel.of(folder), Room(room))


def ask(one: Conversation, said: str, new_tokens: int = 3) -> str:
    pieces: list[str] = []
    one.ask(said, new_tokens=new_tokens, write=pieces.append)
    return "".join(pieces)


def words_of(one: Conversation) -> list[str]:
    """What the model read last, but for the roles."""
    own = {number: word for word, number in NUMBER.items()}
    return [own[n] for n in one.decoder.prompts[-1] if n in own and own[n] not in ("a",)]  # type: ignore[attr-defined]


def test_a_model_with_a_template_reads_all_turns(tmp_path: Path) -> None:
    one = talk(tmp_path)
    assert ask(one, "the name") == "list of value"
    assert words_of(one) == ["the", "name"]
    ask(one, "that type")
    assert words_of(one) == ["the", "name", "list", "of", "value", "that", "type"]
    assert one.turns == ["the name", "list of value", "that type", "list of value"]


def test_a_model_without_a_template_continues_each_line(tmp_path: Path) -> None:
    one = talk(tmp_path, template=None)
    ask(one, "the name")
    ask(one, "that type")
    assert words_of(one) == ["that", "type"]


def test_the_oldest_turns_go_where_there_is_no_room(tmp_path: Path) -> None:
    one = talk(tmp_path, room=20)
    for said in ("the name", "that type", "if"):
        ask(one, said)
    assert one.forgotten == 2
    assert words_of(one) == ["that", "type", "list", "of", "value", "if"]
    with raises(BackendError, "cache-too-short"):
        ask(one, "the name " * 20)
    assert not one.turns  # and the talk goes on
    assert ask(one, "the name")


def test_what_an_interrupted_answer_said_is_remembered(tmp_path: Path) -> None:
    one = talk(tmp_path)

    def stop(_piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.ask("the name", new_tokens=3, write=stop)
    assert one.turns == ["the name", "list"]
    ask(one, "if")
    assert words_of(one) == ["the", "name", "list", "if"]


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tokenizers")
    for name in ("whole", "cut"):
        write_tokenizer(write_tiny_lm(tmp_path / name))
    (tmp_path / "whole" / "chat_template.jinja").write_text(TEMPLATE)
    return [str(tmp_path / "whole"), str(tmp_path / "cut")]


def test_all_models_answer_the_lines_of_a_pipe(
    models: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--json"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("the name\n\n/new\nthat type\n"))
        assert run([*words, "chat", *models, "-n", "4"]) == 0
        shown = capsys.readouterr()
        if not words:
            assert (shown.out.count("whole:"), shown.out.count("cut:")) == (2, 2)
            assert shown.err.count("tokens") == 4
            assert "cut has no chat template" in shown.err
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the name", "that type"]
    names = [[answer["model"] for answer in line["answers"]] for line in lines]
    assert names == [["whole", "cut"]] * 2
    assert all(len(a["token_ids"]) == 4 and a["text"] for ln in lines for a in ln["answers"])


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (("a/m.onnx", "b/m.onnx"), ["a", "b"]),
        (("out/a", "out/b/"), ["a", "b"]),
        (("x/a", "x/a"), ["x/a", "x/a"]),
        (("one",), ["one"]),
    ],
)
def test_names_are_what_differs(models: tuple[str, ...], names: list[str]) -> None:
    assert _names(models) == names


def test_a_model_that_is_not_there_ends_the_command(tmp_path: Path) -> None:
    assert run(["chat", str(tmp_path / "nothing")]) == 2


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A terminal: what is sent is typed there."""
    monkeypatch.setattr(asking, "can_ask", lambda _progress: True)
    monkeypatch.setattr("prompt_toolkit.output.create_output", lambda *_: DummyOutput())
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed", "number"),
    [("2\r", 0), ("\x1b[B\x1b[B\r", 1), ("\r", None), ("1\r", None), ("\x03", None)],
)  # fmt: skip
def test_one_is_picked_by_arrow_or_number(typed: str, number: int | None, keys: Any) -> None:
    keys.send_text(typed)
    assert asking.choose("Which?", ["a", "b"], ConsoleProgress()) == number


def test_lines_are_typed_until_the_end(keys: Any) -> None:
    keys.send_text("one\rtwo\r\x04")
    assert [*asking.lines_of_user(ConsoleProgress())] == ["one", "two"]


def test_nothing_is_asked_without_a_terminal() -> None:
    assert asking.choose("Which?", ["a", "b"], ConsoleProgress()) is None


@pytest.mark.parametrize("reason", ["json", "quiet", "ci", "script", None])
def test_nothing_is_asked_of_a_script(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout"):
        stream = io.StringIO()
        stream.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(f"sys.{name}", stream)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("os.getpgrp", lambda: 1 if reason == "script" else os.getpid())
    progress = ConsoleProgress(verbosity=-1 if reason == "quiet" else 0)
    progress.as_json = reason == "json"
    if reason == "ci":
        monkeypatch.setenv("CI", "true")
    assert asking.can_ask(progress) == (reason is None)


def test_commands_run_until_none_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    picked, ran = iter([1, 0, None]), list[list[str]]()
    monkeypatch.setattr(asking, "choose", lambda *_: next(picked))
    monkeypatch.setattr("exporter.cli.run", lambda words: ran.append(words) or 0)
    asking.offer("What next?", [("a", ["x"]), ("b", ["y"])], ConsoleProgress())
    assert ran == [["y"], ["x"]]
    picked = iter([0])  # one that fails ends it
    monkeypatch.setattr("exporter.cli.run", lambda words: 2)
    asking.offer("What next?", [("a", ["x"])], ConsoleProgress())


def request_of(**changes: Any) -> Any:
    values = {"source": "m.gguf", "output": Path("out"), "drop_attn": 1, **changes}
    return build(ExportCall, values).request


def test_each_cut_of_a_decoder_is_offered() -> None:
    words = ["export", "m.gguf", "-o", "out"]
    steps = [*_next_steps(request_of(), full_report(), words)]
    measured = [*cut_lines(full_report())]
    cuts = [corner for corner in full_report().corners if corner.pruned]
    assert len(measured) == len(cuts) > 1
    assert [step[1][:1] for step in steps] == [["chat"]] * len(cuts) + [["export"], ["gguf"]]
    assert steps[-2][1] == [*words, "--checkpoint"]
    pair = gate_report()
    ((whole, cut, text),) = cut_lines(pair)
    assert (whole, cut) == (pair.arms.baseline.path, pair.arms.candidate.path)
    assert "x [" in text


def test_no_talk_is_offered_with_what_answers_no_tokens() -> None:
    report = gate_report()
    assert report.accuracy is not None
    other = report.accuracy.model_copy(update={"compared": "embeddings"})
    for accuracy in (other, None):
        changed = report.model_copy(update={"accuracy": accuracy})
        assert not [*_next_steps(request_of(), changed, [])]
    assert [*_next_steps(request_of(), report, [])]


@pytest.mark.parametrize("number", [0, None])
def test_the_row_that_is_picked_is_planned_and_exported(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result: DepthsReport = made_answer()
    call = build(studies.DepthsCall, {"model": "m", "output": tmp_path / "depths.json"})
    ran: list[list[str]] = []
    monkeypatch.setattr(studies, "choose", lambda *_: number)
    monkeypatch.setattr(studies, "run_words", lambda words: ran.append(words))
    studies._offer_cuts(call, result, ConsoleProgress())
    plan = tmp_path / "depths.plan.json"
    assert plan.exists() == bool(ran) == (number is not None)
    if number is not None:
        cell = next(cell for cell in result.cells if cell.damage is not None)
        assert PruningPlan.read(plan).deletions == cell.deletions
        assert ran[0][:2] == ["export", "m"]
        assert str(plan) in ran[0]
