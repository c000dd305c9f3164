"""What both arms say to prompts, how far they go on alike, and embeddings of both."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from exporter.artifacts import CUT, ComparisonReport, SampleAnswers
from exporter.cli import run
from exporter.compare.agreement import compare_embeddings
from exporter.compare.answers import Embeddings
from exporter.compare.evaluation import EvaluationTokens, questions
from exporter.compare.options import CompareOptions, QualityOptions
from exporter.compare.session import compare
from exporter.engines.decoding.generate import continuations
from exporter.engines.decoding.runner_decoder import RunnerDecoder
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, ComparisonError, TextSourceError
from exporter.report.sections.summary import repeats_itself
from tests.compared import accuracy_of, encoder, encoders, language_model, language_models
from tests.made_reports import as_markdown, as_page, as_text
from tests.present import present
from tests.raising import ends_in, raises
from tests.reading import Heard, in_file
from tests.stand_in.decoders import Scripted
from tests.text_graphs import WORDS, write_tokenizer

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("no_timing")
TEMPLATE = "the list {{ messages[0]['content'] }} is"
CHAT = {"chat_template.jinja": TEMPLATE}
PAIR = ("baseline", "candidate")
PROMPTS = np.array([[0, 5], [1, 5], [2, 5]])
SHORT = CompareOptions(eval_tokens=96, prefill_lengths=(4,))


def options(**quality: Any) -> CompareOptions:
    few = {"agreement_prompts": 0, "answer_tokens": 5} | quality
    return replace(SHORT, quality=QualityOptions(**few))


def answers(folders: tuple[Path, Path], **quality: Any) -> SampleAnswers:
    return present(accuracy_of(*folders, options=options(**quality)).answers)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text("the value")
    return path


@pytest.mark.parametrize(
    ("files", "chat"), [(CHAT, True), ({}, False), ({"chat_template.jinja": "{% for"}, False)]
)
def test_a_chat_template_is_used_where_there_is_one_that_works(
    tmp_path: Path, files: dict[str, str], chat: bool
) -> None:
    said = answers(language_models(tmp_path, files))
    assert (said.chat, len(said.answers)) == (chat, 4)


@pytest.mark.parametrize(
    ("answer", "repeats"),
    [
        (
            "The capital of the UK is London. The capital of the UK is London. The …",
            True,
        ),
        ("The train is on the clock. The train is on the clock.", True),
        ("a symbol of luxury, art, fashion, art, art, art, art, art, art …", True),
        ("Red is a colour that is often liked. Blue is a colour that is often seen.", False),
        ("The capital of France is Paris, a city of two million people on the Seine.", False),
        ("no no no", False),
        ("", False),
    ],
)
def test_an_answer_in_a_loop_is_seen(answer: str, repeats: bool) -> None:
    assert repeats_itself(answer) is repeats


@pytest.mark.parametrize("chat", [True, False])
def test_built_in_prompts_are_answered_by_both(tmp_path: Path, chat: bool) -> None:
    said = answers(language_models(tmp_path, CHAT), chat=chat)
    assert (said.chat, said.source, said.new_tokens) == (chat, "built in", 5)
    known = questions(None)
    assert [answer.prompt for answer in said.answers] == [
        *(known.texts if chat else known.openings)
    ]
    assert 3 <= len(said.answers) <= 5
    assert any(answer.baseline != answer.candidate for answer in said.answers)
    assert not said.left_out


def test_the_template_decides_what_the_model_reads(tmp_path: Path, prompts: Path) -> None:
    folders = language_models(tmp_path)
    texts = {"of that": {}, "the list of that is": {}, "in the template": CHAT}
    first = {}
    for text, files in texts.items():
        prompts.write_text("of that" if files else text)
        for name, content in files.items():
            (folders[0] / name).write_text(content)
        first[text] = answers(folders, prompts=prompts, chat=bool(files)).answers[0]
    plain, same, chat = first.values()
    assert chat.baseline == same.baseline != plain.baseline
    assert (chat.prompt, same.prompt) == ("of that", "the list of that is")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "the value\n\n  if that \n"),
        ("p.jsonl", '{"prompt": "the value", "more": "longer than all"}\n{"q": "if that"}\n'),
    ],
)
def test_the_user_s_prompts_are_a_line_each(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    said = answers(language_models(tmp_path), prompts=tmp_path / name)
    assert [answer.prompt for answer in said.answers] == ["the value", "if that"]
    assert said.source == str(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("p.txt", "\n  \n", "no-text"),
        ("p.jsonl", "", "no-text"),
        ("p.jsonl", '{"prompt": 3}', "bad-line"),
        ("p.jsonl", "prompt", "bad-line"),
    ],
)
def test_a_file_without_prompts_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, code: str
) -> None:
    monkeypatch.delattr("exporter.compare.answers.Answers.hold")
    (tmp_path / name).write_text(text)
    with raises(TextSourceError, code, name):
        answers(language_models(tmp_path), prompts=tmp_path / name)


@pytest.mark.parametrize(("end", "ended"), [(99, False), (list(range(32)), True)])
def test_an_answer_says_whether_it_was_cut(
    tmp_path: Path, prompts: Path, end: Any, ended: bool
) -> None:
    said = answers(language_models(tmp_path, eos_token_id=end), prompts=prompts)
    assert said.answers[0].baseline.endswith(CUT) is not ended
    assert bool(said.answers[0].baseline.removesuffix(CUT)) is not ended


@pytest.mark.parametrize(
    ("files", "config", "reason"),
    [
        ({}, {"max_position_embeddings": 96}, "96"),
        ({"chat_template.jinja": "{% for"}, {}, "chat_template.jinja"),
        ({"chat_template.jinja": ""}, {}, "prompt 1"),
    ],
)
def test_what_can_t_be_answered_is_left_out_with_a_reason_or_refused_if_it_was_asked_for(
    tmp_path: Path, prompts: Path, files: dict[str, str], config: dict[str, int], reason: str
) -> None:
    folders = language_models(tmp_path, files, **config)
    asked: dict[str, Any] = {"answer_tokens": 90, "chat": bool(files)}
    result = accuracy_of(*folders, options=options(**asked))
    assert present(result.answers).answers == []
    assert reason in present(result.answers).left_out
    assert result.top1_agreement is not None
    prompts.write_text("the value " * 4)
    with raises(ComparisonError, "prompts-unanswered", "--prompts", prompts, reason):
        answers(folders, **asked, prompts=prompts)


def test_without_a_tokenizer_one_line_says_so(tmp_path: Path) -> None:
    folders = language_models(tmp_path)
    for folder in folders:
        (folder / "tokenizer.json").unlink()
    report = compare(*folders, options())
    assert "tokenizer.json" in present(present(report.accuracy).answers).left_out
    (line,) = (
        as_markdown(report).split("## What the models say\n\n")[1].split("\n\n## ")[0].splitlines()
    )
    assert "tokenizer.json" in line
    assert "Sample answers" not in as_text(report)


def test_a_tokenizer_of_another_model_s_template_is_left_out(tmp_path: Path) -> None:
    folders = language_models(tmp_path, {"chat_template.jinja": "beyond"})
    for folder in folders:
        write_tokenizer(folder, [*WORDS, *(f"w{number}" for number in range(20)), "beyond"])
    said = answers(folders, chat=True)
    assert said.left_out
    assert not said.answers


def test_the_command_shows_them_in_every_form(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 900)))
    arms = map(str, language_models(tmp_path, CHAT, num_hidden_layers=2))
    call = ["compare", *arms, "-o", str(tmp_path / "out"), "-q", "--eval-text", str(text)]
    call += ["--eval-tokens", "96", "--prompts", str(prompts)]
    keys = ["agreement_prompts: 1", "agreement_tokens: 5", "answer_tokens: 3"]
    assert run([*call, *in_file(tmp_path, keys)]) == 0
    report = ComparisonReport.read(tmp_path / "out" / "report.json")
    accuracy = present(report.accuracy)
    assert accuracy.prompts == 1
    (result,) = present(accuracy.answers).answers
    words = result.candidate.removesuffix(CUT).split()
    assert 0 < len(words) <= 3
    for item in (capsys.readouterr().out, as_markdown(report), as_page(report)):
        assert "the value" in item
        assert " ".join(words) in item
    with ends_in(TextSourceError, "no-text", prompts):
        prompts.write_text("")
        assert run(call) == 2


def test_generate_asks_in_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(language_model(tmp_path, CHAT))

    def generated(*words: str) -> Any:
        assert run(["generate", model, "-n", "4", "--threads", "1", "--json", "-q", *words]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    chat = generated("of that", "--chat")
    assert generated("the list of that is") == chat != generated("of that")


def test_generate_makes_no_template_up(tmp_path: Path) -> None:
    model, other = language_model(tmp_path / "a"), language_model(tmp_path / "elsewhere", CHAT)
    call = ["generate", str(model), "of that", "--chat"]
    with ends_in(BackendError, "no-chat-template", "--chat", "--tokenizer", model):
        assert run(call) == 2
    assert run([*call, "--tokenizer", str(other), "-n", "2", "--threads", "1"]) == 0


def test_an_encoder_can_t_be_asked(tmp_path: Path, prompts: Path) -> None:
    model, other = encoders(tmp_path)
    for folder in (model, other):
        write_tokenizer(folder)
    with raises(ComparisonError, "prompts-unanswered", prompts):
        compare(model, other, options(prompts=prompts))
    for code in ("no-chat-template", "no-kv-cache"):
        with ends_in(BackendError, code):
            assert run(["generate", str(model), "the value", "--chat"]) == 2
        (model / "chat_template.jinja").write_text(TEMPLATE)


# Greedy continuations.


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_texts_agree_up_to_the_first_other_token(batch_size: int | None) -> None:
    first = Scripted([1, 2, 3], [4, 5, 6], [7, 9, 1])
    second = Scripted([1, 2, 3], [4, 8, 6], [7, 9, 2])
    texts = (
        continuations(arm, PROMPTS, new_tokens=3, stop_ids={9}, batch_size=batch_size)
        for arm in (first, second)
    )
    first_texts, second_texts = texts
    same = (first_texts == second_texts).all(axis=1)
    assert same.tolist() == [True, False, True]  # after the 9 nothing counts
    assert first.batches == {None: [3], 1: [1, 1, 1], 2: [2, 1]}[batch_size]
    first_texts, second_texts = (
        continuations(arm, PROMPTS, new_tokens=3) for arm in (first, second)
    )
    assert (first_texts == second_texts).all(axis=1).tolist() == [True, False, False]


@pytest.mark.parametrize(("longest_cache", "generates"), [(126, False), (127, True)])
def test_generation_beyond_what_a_runner_holds_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_cache: int, generates: bool
) -> None:
    def refuse(_: object, batch: int, prompt: int, new_tokens: int) -> None:
        if prompt + new_tokens - 1 > longest_cache:
            raise BackendError("no profile holds this call")

    monkeypatch.setattr(RunnerDecoder, "refuse_unfit", refuse)
    accuracy = accuracy_of(*language_models(tmp_path), options=SHORT)
    assert (accuracy.prompts is not None) == generates
    assert accuracy.top1_agreement is not None


class Compiled(OnnxRuntimeRunner):
    """As an arm of torch.compile says what it does."""

    def __init__(self, model: Path, **kind: Any) -> None:
        super().__init__(model, **kind)
        self.capabilities = replace(self.capabilities, shapes="compiled")


def test_what_would_be_compiled_for_each_length_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.engines.runners.onnxruntime.OnnxRuntimeRunner", Compiled)
    arms = language_models(tmp_path)
    accuracy = accuracy_of(*arms, options=SHORT)
    assert accuracy.kl_divergence is not None
    assert accuracy.prompts is None
    (tmp_path / "mine.jsonl").write_text('{"query": "a b", "choices": ["c", "d"], "gold": 0}')
    tasks = QualityOptions(tasks=("mine",), task_data=tmp_path)
    with raises(ComparisonError, "recompiles") as caught:
        compare(*arms, replace(SHORT, quality=tasks))
    assert "torch:DIR" in caught.value.hint
    heard = Heard()
    assert compare(*encoders(tmp_path / "e"), SHORT, progress=heard).accuracy is None
    assert not any("logits" in line for line in heard.lines)  # which isn't why


# Embeddings.


def test_encoders_are_judged_by_their_embeddings(tmp_path: Path) -> None:
    first, second = encoders(tmp_path)
    write_tokenizer(first)
    accuracy = accuracy_of(first, second, options=SHORT)
    assert accuracy.text_source.startswith("pydoc (evaluation half")
    assert (accuracy.perplexity, accuracy.kl_divergence) == (None, None)
    near = accuracy.figures
    assert 0 < near["lowest_cosine"] < near["embedding_cosine"] < 1
    assert 0 < near["rank_agreement"] < 1
    same = accuracy_of(first, first, options=SHORT).figures
    assert same == dict.fromkeys(near, pytest.approx(1, abs=1e-12))


def test_embeddings_agree_with_a_plain_computation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 32, size) for size in (3, 9, 5, 7, 4)]
    with ExitStack() as stack:
        runners = [
            stack.enter_context(OnnxRuntimeRunner(folder / "model.onnx", threads=1))
            for folder in encoders(tmp_path)
        ]
        pair: Any = dict(zip(PAIR, runners, strict=True))
        held = Embeddings(EvaluationTokens(texts, "t", "0")).hold(pair, [PAIR])
        result = held[PAIR]
        arms = [
            [one.run({"input_ids": ids[None]})["last_hidden_state"][0].mean(0) for ids in texts]
            for one in runners
        ]
    with raises(ComparisonError, "text-too-short", 2):
        Embeddings(EvaluationTokens(texts[:2], "t", "0"))
    unit = [arm / np.linalg.norm(arm, axis=1, keepdims=True) for arm in arms]
    assert result.figures["embedding_cosine"] == pytest.approx(
        (unit[0] * unit[1]).sum(1).mean(), rel=1e-5
    )
    pairs = [[one[i] @ one[j] for i in range(5) for j in range(i)] for one in unit]
    ranking = result.figures["rank_agreement"]
    assert ranking == pytest.approx(stats.spearmanr(*pairs).statistic, rel=1e-9)
    assert result.intervals["rank_agreement"].value == ranking


def test_the_interval_of_the_ranking_holds_that_of_other_texts_of_the_kind() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((400, 8))
    second = first + 0.5 * rng.standard_normal(first.shape)
    unit = [item / np.linalg.norm(item, axis=1, keepdims=True) for item in (first, second)]
    wanted = compare_embeddings(*(item[:200] for item in unit))[0]["rank_agreement"]
    intervals = [
        compare_embeddings(*(item[n : n + 20] for item in unit))[1]["rank_agreement"].ci95
        for n in range(200, 400, 20)
    ]
    assert sum(low <= wanted <= high for low, high in intervals) >= 8
    assert max(high - low for low, high in intervals) < 0.5


def test_embeddings_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    texts = [np.array([1, 2])] * 3
    broken = encoder(tmp_path, scale=float("nan"))
    with (
        OnnxRuntimeRunner(broken / "model.onnx", threads=1) as runner,
        raises(ComparisonError, "not-finite", "candidate", "text 0"),
    ):
        Embeddings(EvaluationTokens(texts, "t", "0")).hold({"candidate": runner}, [])
