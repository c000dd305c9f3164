"""The number of threads: found where nobody says it, kept where a run goes on, recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from tiny_lm import write_tiny_lm

import exporter.compare.threads
from exporter.artifacts import ComparisonReport, ThreadProbe, ThreadTrial
from exporter.cli import run
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.compare.threads import candidates, choose_threads, fastest
from exporter.engines.runners.base import Array, BoundCall, Capabilities, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import TensorSpec
from exporter.gate.keys import key_of

OPTIONS = CompareOptions(
    prefill_lengths=(8, 4), decode_past_lengths=(), rounds=2, eval_tokens=32,
    eval_sequence_length=16,
)  # fmt: skip


class Stub(Runner):
    """A runner whose calls move a clock, by what its number of threads and the visit say."""

    backend, provider = "onnxruntime", "CPUExecutionProvider"
    inputs = (TensorSpec("input_ids", np.dtype(np.int64), ("batch", "sequence")),)
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, call_ms: Callable[[int, int], float]) -> None:
        self.threads = 7
        self.now_ns = 0
        self.entered: list[int] = []
        self.lengths: set[int] = set()
        self._call_ms = call_ms

    def __enter__(self) -> Self:
        self.entered.append(self.threads)
        self.now_ns += 500_000_000
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def run(self, inputs: Mapping[str, Array], outputs: Any = None, **_: Any) -> dict[str, Array]:
        raise AssertionError("nothing but prepared calls is timed")

    def prepare(self, inputs: Mapping[str, Array], *, phase: Any = None) -> BoundCall:
        self.lengths.add(inputs["input_ids"].shape[1])
        threads, visit = self.threads, self.entered.count(self.threads)

        def call() -> None:
            self.now_ns += round(1e6 * self._call_ms(threads, visit))

        return BoundCall(call)


def probed(call_ms: Callable[[int, int], float], most: int = 4, **kind: Any) -> tuple[Stub, Any]:
    stub = Stub(call_ms)
    return stub, choose_threads(stub, most=most, clock=lambda: stub.now_ns, **kind)


@pytest.mark.parametrize(
    ("call_ms", "best"),
    [
        ({1: 40, 2: 22, 3: 16, 4: 13}, 4),
        ({1: 40, 2: 43, 3: 60, 4: 90}, 1),
        ({1: 40, 2: 22, 3: 16, 4: 24}, 3),
        ({1: 40, 2: 20.3, 3: 20, 4: 20}, 2),  # less than 2 % isn't worth a thread
        ({1: 40, 2: 20.5, 3: 20, 4: 20}, 3),
    ],
)
def test_the_fastest_is_taken_and_on_a_tie_the_fewest(call_ms: dict[int, float], best: int) -> None:
    stub, probe = probed(lambda threads, visit: call_ms[threads])
    assert stub.threads == fastest(probe) == best
    assert [trial.threads for trial in probe.trials] == [1, 2, 3, 4]
    times = {t.threads: set(t.visits_ms[0]) for t in probe.trials}
    assert times == {number: {ms} for number, ms in call_ms.items()}


def test_numbers_are_tried_in_turns_and_hopeless_ones_once() -> None:
    stub, probe = probed(lambda threads, visit: {1: 90.0, 2: 40.0, 3: 30.0, 4: 25.0}[threads])
    assert stub.entered[:4] == [4, 3, 2, 1]
    assert stub.entered[4:6] == [3, 4]
    assert stub.entered.count(1) == stub.entered.count(2) == 1
    assert probe.step == "encode 128"


def test_a_number_that_alone_is_left_is_visited_no_more() -> None:
    stub, probe = probed(lambda threads, visit: 90.0 / threads, most=2)
    assert stub.entered == [2, 1]
    assert fastest(probe) == stub.threads == 2


def test_a_disturbed_visit_decides_nothing() -> None:
    disturbed = {(4, 1): 1.7, (2, 2): 1.7}
    quiet = {1: 30, 2: 18, 3: 14, 4: 10}
    stub, _ = probed(lambda threads, visit: quiet[threads] * disturbed.get((threads, visit), 1))
    assert stub.threads == 4


def test_there_is_nothing_to_try_on_one_core() -> None:
    stub, probe = probed(lambda threads, visit: 9.0, most=1)
    assert (stub.entered, probe) == ([], None)


def test_a_long_step_is_called_and_visited_rarely() -> None:
    stub, probe = probed(lambda threads, visit: 3000.0 / threads)
    assert {len(times) for trial in probe.trials for times in trial.visits_ms} == {2}
    assert max(len(trial.visits_ms) for trial in probe.trials) == 2
    assert stub.threads == 4
    visits = sum(len(trial.visits_ms) for trial in probe.trials)
    taken_ms = sum(sum(times) for trial in probe.trials for times in trial.visits_ms)
    assert stub.now_ns == 1e6 * (500 * visits + taken_ms)  # no call that isn't timed


def test_what_a_model_can_not_reach_is_not_asked_for() -> None:
    stub, _ = probed(lambda threads, visit: 9.0, longest=17)
    assert stub.lengths == {16}


@pytest.mark.parametrize(
    "able", [Capabilities("gpu"), Capabilities("gpu", "profiles"), Capabilities("cpu", "compiled")]
)
def test_nothing_is_tried_on_a_gpu_or_what_is_compiled(
    able: Capabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stub, "capabilities", able)
    stub, probe = probed(lambda threads, visit: 9.0)
    assert probe is None
    assert (stub.entered, stub.threads) == ([], 7)


def test_many_cores_are_tried_in_steps() -> None:
    assert [candidates(most) for most in (1, 2, 5)] == [[1], [1, 2], [1, 2, 3, 4, 5]]
    assert candidates(40) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]


@pytest.fixture
def arms(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny_lm(tmp_path / "baseline"), write_tiny_lm(tmp_path / "candidate", layers=(1,))


def two(*_: Any, **__: Any) -> ThreadProbe:
    trials = [ThreadTrial(threads=n, visits_ms=[[4.0 / n]]) for n in (1, 2)]
    return ThreadProbe(step="encode 4", trials=trials)


def test_both_arms_get_the_number_and_the_report_says_how_it_was_found(
    arms: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.compare.threads, "default_threads", lambda: 2)
    seen: list[int] = []
    enter = OnnxRuntimeRunner.__enter__
    monkeypatch.setattr(
        OnnxRuntimeRunner, "__enter__", lambda self: (seen.append(self.threads), enter(self))[1]
    )
    report = compare(*arms, OPTIONS)
    machine, probe = report.environment, report.environment.thread_probe
    assert probe is not None
    assert probe.step == "prefill 4"  # its shortest
    assert machine.threads == fastest(probe) == key_of(report).threads
    tries = sum(len(trial.visits_ms) for trial in probe.trials)
    assert set(seen[:tries]) == {1, 2}
    assert set(seen[tries:]) == {machine.threads}
    decode = compare(*arms, replace(OPTIONS, decode_past_lengths=(6, 3))).environment.thread_probe
    assert decode is not None
    assert decode.step == "decode 1, cache 6"
    longer = compare(*arms, replace(OPTIONS, prefill_lengths=(200,))).environment.thread_probe
    assert longer is not None
    assert longer.step == "prefill 128"


def test_the_order_of_rounds_is_another_in_each_run_and_recorded(arms: tuple[Path, Path]) -> None:
    seeds = {compare(*arms, replace(OPTIONS, threads=1)).environment.order_seed for _ in range(2)}
    assert len(seeds) == 2
    assert None not in seeds


def test_a_number_that_was_asked_for_is_taken(
    arms: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.compare.threads, "choose_threads", refuse)
    machine = compare(*arms, replace(OPTIONS, threads=2)).environment
    assert (machine.threads, machine.thread_probe) == (2, None)


def refuse(*_: Any, **__: Any) -> ThreadProbe:
    raise AssertionError("nothing is to be looked for")


def test_a_comparison_that_goes_on_keeps_the_first_choice(
    arms: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.compare.threads, "choose_threads", two)
    first = compare(*arms, OPTIONS, resume=tmp_path)
    monkeypatch.setattr(exporter.compare.threads, "choose_threads", refuse)
    again = compare(*arms, OPTIONS, resume=tmp_path)
    assert again.environment.threads == first.environment.threads == 2
    assert again.environment.thread_probe == two()
    assert again.latency[0].baseline.samples_ms == first.latency[0].baseline.samples_ms
    with pytest.raises(AssertionError):
        compare(*arms, OPTIONS, resume=tmp_path / "other")
    other = compare(*arms, replace(OPTIONS, threads=2), resume=tmp_path)
    assert other.latency[0].baseline.samples_ms != first.latency[0].baseline.samples_ms


def test_a_confirmation_runs_on_the_number_of_its_report(
    arms: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter.compare.threads, "choose_threads", two)
    command = [
        *("compare", *map(str, arms), "-o", str(tmp_path / "out"), "--threads", "auto"),
        *("--prefill", "4", "--decode-past", "", "--rounds", "8", "--eval-tokens", "16"),
    ]
    monkeypatch.setattr("sys.argv", ["depthcut", *command])
    assert run(command) == 0
    report = ComparisonReport.read(tmp_path / "out" / "report.json")
    assert report.environment.threads == 2
    monkeypatch.setattr(exporter.compare.threads, "choose_threads", refuse)
    from exporter.cli.check import remeasuring
    from exporter.cli.console import ConsoleProgress

    again = remeasuring(report, ConsoleProgress())()
    assert again.environment.threads == 2
    assert again.accuracy is not None
    assert again.accuracy.generation is None


@pytest.mark.parametrize("word", ["0", "all", "1.5"])
@pytest.mark.parametrize("command", ["compare", "export", "evaluate", "generate"])
def test_threads_are_a_number_or_auto(
    command: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, str(tmp_path), "x", "--threads", word]) == 2
    told = capsys.readouterr().err
    assert "'--threads'" in told
    assert f"'{word}'" in told or word == "0"
