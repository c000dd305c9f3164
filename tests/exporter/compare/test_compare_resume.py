"""A comparison that is killed goes on with what it had timed; whole generations are timed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from exporter.artifacts import ComparisonReport
from exporter.artifacts.latency import Shape
from exporter.artifacts.store import Store
from exporter.cli import run
from exporter.compare.kept import forget
from exporter.compare.options import CompareOptions, QualityOptions, TimingOptions
from exporter.compare.session import compare
from exporter.compare.timing.row import Chunk, find_chunk, keep_chunk
from exporter.errors import ComparisonError
from tests.compared import accuracy_of, encoder, language_models, quick
from tests.present import present
from tests.raising import raises
from tests.reading import in_file
from tests.text_graphs import write_tiny_lm

OPTIONS = quick(rounds=8)


def lines(folder: Path) -> list[str]:
    path = folder / ".depthcut" / "comparison.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def chunks(folder: Path) -> list[str]:
    return [line for line in lines(folder) if '"times_ms"' in line]


def kill_once_chunks_are_kept(command: list[str], out: Path) -> bool:
    """Whether it could be killed before it was done, which a busy machine may let it be."""
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(chunks(out)) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_a_killed_run_goes_on_where_it_was(arms: tuple[Path, Path], tmp_path: Path) -> None:
    threshold = in_file(tmp_path, ["threshold: 0.01%"])
    for out in (tmp_path / "out", tmp_path / "again", tmp_path / "last"):
        command = [
            sys.executable, "-m", "exporter.cli", "compare", *map(str, arms), "-o", str(out),
            "--prefill", "4", "--decode-past", "6", "--threads", "1", "--time-budget", "1s",
            *threshold, "--eval-tokens", "32",
        ]  # fmt: skip
        if kill_once_chunks_are_kept(command, out):
            break
    else:
        pytest.fail("three runs were done before they could be killed")
    assert not (out / "report.json").exists()
    kept = [json.loads(line) for line in chunks(out) if line.endswith("}")]
    assert len(kept) >= 2
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "that an earlier run timed" in done.stderr + done.stdout
    assert "accuracy: kept from an earlier run" in done.stderr + done.stdout
    report = ComparisonReport.read(out / "report.json")
    first = [value for round_ms in kept[0]["value"]["times_ms"] for (value,) in round_ms[0]]
    assert report.latency[0].baseline.samples_ms[: len(first)] == first
    assert lines(out) == []


def test_what_was_kept_counts_for_the_same_arms_and_options_only(
    arms: tuple[Path, Path], tmp_path: Path
) -> None:
    first = compare(*arms, OPTIONS, resume=tmp_path)
    assert len(chunks(tmp_path)) == 8
    again = compare(*arms, OPTIONS, resume=tmp_path)
    assert again.latency[0].baseline.samples_ms == first.latency[0].baseline.samples_ms
    other = compare(arms[0], arms[0], OPTIONS, resume=tmp_path)
    assert other.latency[0].baseline.samples_ms != first.latency[0].baseline.samples_ms
    more = compare(arms[0], arms[0], replace(OPTIONS, rounds=7), resume=tmp_path)
    assert more.latency[0].rounds == 7
    forget(tmp_path)
    assert lines(tmp_path) == []


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def stopped_while_timing(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **how: Any) -> None:
    """A comparison that is cut short once the arms' answers are judged."""

    with monkeypatch.context() as patch:
        patch.setattr("exporter.compare.session.time_all", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(*arguments, **how)


@pytest.fixture
def judged(tmp_path: Path, no_timing: None) -> tuple[Path, Path]:
    """Arms with text and a task, where nothing is timed."""
    item = {"query": "the value", "choices": ["of", "a list"], "gold": 1}
    (tmp_path / "words.jsonl").write_text(json.dumps(item))
    return language_models(tmp_path)


def with_tasks(folder: Path, **others: Any) -> CompareOptions:
    few = {"agreement_prompts": 1, "agreement_tokens": 2, **others}
    return quick(quality=QualityOptions(tasks=("words",), task_data=folder, **few))


def test_what_was_found_of_the_answers_is_not_measured_again(
    judged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = with_tasks(tmp_path), tmp_path / "out"
    stopped_while_timing(monkeypatch, *judged, options, resume=out)
    kept = [json.loads(line)["name"] for line in lines(out)]
    assert kept == ["accuracy"]
    fresh = accuracy_of(*judged, options=options)
    assert fresh.tasks
    assert fresh.prompts is not None
    assert present(fresh.answers).answers
    for name in (
        "answers.Answers.hold", "answers.generation_agreements", "answers.sample_answers",
        "tasks.choosing.score_tasks",
    ):  # fmt: skip
        monkeypatch.setattr(f"exporter.compare.{name}", stop)
    assert accuracy_of(*judged, options=options, resume=out) == fresh


OTHERWISE: dict[str, Callable[[str], str]] = {
    "a/chat_template.jinja": lambda _: "{{ messages[0].content }}",
    "b/preprocessor_config.json": lambda _: "{}",
    "prompts.txt": lambda _: "a list\n",
    "a/tokenizer.json": lambda text: text + "\n",
    "words.jsonl": lambda text: text + "\n",
    "out/.depthcut/comparison.jsonl": lambda text: text.replace(
        text.splitlines()[0],
        json.dumps(json.loads(text.splitlines()[0]) | {"value": {"accuracy": {"tokens": 1}}}),
    ),
    "options": str,
}


@pytest.mark.parametrize("changed", OTHERWISE)
def test_answers_to_another_question_are_measured_anew(
    judged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("the value\n")
    options = with_tasks(tmp_path, prompts=prompts)
    stopped_while_timing(monkeypatch, *judged, options, resume=out)
    if changed == "options":
        options = with_tasks(tmp_path, prompts=prompts, agreement_tokens=3)
    else:
        file = tmp_path / changed
        file.write_text(OTHERWISE[changed](file.read_text() if file.exists() else ""))
    monkeypatch.setattr("exporter.compare.answers.Tokens.hold", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(*judged, options, resume=out)


@pytest.mark.parametrize(
    "spoilt",
    [*({"times_ms": times} for times in ([[[[0]]]], [[[0.1]]], [], "many")),
     {"launches": ["kernels", "kernels"]}],
)  # fmt: skip
def test_what_is_no_chunk_is_measured_again(tmp_path: Path, spoilt: dict[str, Any]) -> None:
    cell, store = Shape("prefill", 1, 4, 0), Store(tmp_path / "kept.jsonl")
    keep_chunk(store, cell, 0, replace(ONE_ARM, launches=("kernels",)))
    keep_chunk(store, cell, 1, ONE_ARM)
    assert find_chunk(store, cell, 1) is not None
    store.keep(f"{cell} #1", {**ONE_ARM.to_json(), **spoilt})
    assert find_chunk(store, cell, 1) is None
    assert find_chunk(store, cell, 0) is not None


ONE_ARM = Chunk(np.ones((1, 1, 2, 1)), 1, settled=True, clock="host", planned=2, reloaded=False)


@pytest.mark.parametrize("wrong", ["nowhere", "interface"])
def test_what_fails_before_anything_is_measured_leaves_nothing(
    arms: tuple[Path, Path], tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_lm(tmp_path / "interface", output="last_hidden_state")
    before = sorted(tmp_path.iterdir())
    call = ["compare", str(arms[0]), str(tmp_path / wrong), "-o", str(tmp_path / "new" / "out")]
    assert run([*call, "--prefill", "4", "--eval-tokens", "32"]) == 2
    assert "depthcut: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_whole_generations_are_timed_in_three_rows(arms: tuple[Path, Path], tmp_path: Path) -> None:
    timing = TimingOptions(generate=((4, 3),))
    options = quick(batches=(1, 2), prefill_lengths=(), timing=timing)
    report = compare(*arms, options)
    assert [(row.phase, row.batch) for row in report.latency] == [
        (phase, batch)
        for batch in (1, 2)
        for phase in ("first_token", "per_token", "generate")
    ]  # fmt: skip
    for first, later, whole in zip(*[iter(report.latency)] * 3, strict=True):
        assert (whole.sequence_length, whole.new_tokens, whole.past_length) == (4, 3, 0)
        for arm in ("baseline", "candidate"):
            parts = [getattr(row, arm).samples_ms for row in (first, later, whole)]
            for ttft, tpot, total in zip(*parts, strict=True):
                assert total == pytest.approx(ttft + 2 * tpot, rel=1e-6)
    folder = encoder(tmp_path / "e")
    with raises(ComparisonError, "no-kv-cache", "--generate"):
        compare(folder, folder, quick(timing=timing))


def test_the_machine_is_looked_at_between_chunks(arms: tuple[Path, Path]) -> None:
    report = compare(*arms, OPTIONS)
    environment = report.environment
    assert len(environment.states) == 1 + 8
    assert environment.affinity
    other = json.loads(report.to_json())
    assert ComparisonReport.model_validate(other) == report
    other["environment"]["other"] = 1
    with pytest.raises(ValidationError):
        ComparisonReport.model_validate(other)


def test_threads_are_the_cores_unless_a_number_is_asked_for(
    arms: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.compare.session.default_threads", lambda: 3)
    machines = [compare(*arms, quick(threads=threads)).environment for threads in (None, 2)]
    assert [machine.threads for machine in machines] == [3, 2]
