"""The timing harness, mostly on stub arms that move a clock of their own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_lm import write_tiny_lm

from exporter.backends.onnxruntime import OnnxRuntimeRunner
from exporter.errors import ComparisonError
from exporter.measure import latency
from exporter.measure.inputs import Shape, has_cache, make_inputs, random_tokens
from exporter.measure.latency import Sampling, Warmup, measure_row, sample_pair, warm_up
from exporter.measure.statistics import paired_speedup, verdict


class FakeClock:
    """Time that only the stub arms move."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.now_ns

    def arm(self, name: str, milliseconds: Callable[[int], float]) -> Callable[[], None]:
        """A stub whose n-th call takes ``milliseconds(n)``."""
        made = 0

        def call() -> None:
            nonlocal made
            self.calls.append(name)
            self.now_ns += round(milliseconds(made) * 1e6)
            made += 1

        return call


def test_rounds_are_abba_then_baab() -> None:
    clock = FakeClock()
    arms = clock.arm("A", lambda _: 100.0), clock.arm("B", lambda _: 50.0)
    sampling = Sampling(rounds=2, row_seconds=0)
    baseline, candidate = sample_pair(*arms, sampling, call_ms=100, clock=clock)
    assert "".join(clock.calls) == "ABBA" + "BAAB"
    np.testing.assert_array_equal(baseline, np.full((2, 2), 100.0))
    np.testing.assert_array_equal(candidate, np.full((2, 2), 50.0))


def test_short_calls_come_in_turns_whose_first_is_not_timed() -> None:
    clock = FakeClock()

    def slow_after_the_other(_: int) -> float:
        return 10.0 if clock.calls[-2:-1] != clock.calls[-1:] else 5.0

    arms = clock.arm("A", slow_after_the_other), clock.arm("B", lambda _: 5.0)
    sampling = Sampling(rounds=2, row_seconds=0, visit_ms=20)
    baseline, candidate = sample_pair(*arms, sampling, call_ms=5, clock=clock)
    assert "".join(clock.calls[:20]) == "A" * 5 + "B" * 10 + "A" * 5
    assert baseline.shape == candidate.shape == (2, 8)
    assert set(baseline.ravel()) == {5.0}


def test_short_rows_get_more_rounds_up_to_a_limit() -> None:
    for row_seconds, rounds in ((0.0, 3), (4.0, 10), (100.0, 12)):
        clock = FakeClock()
        arms = clock.arm("A", lambda _: 100.0), clock.arm("B", lambda _: 100.0)
        sampling = Sampling(rounds=3, most_rounds=12, row_seconds=row_seconds)
        baseline, _ = sample_pair(*arms, sampling, call_ms=100, clock=clock)
        assert len(baseline) == rounds


def test_warm_up_ends_when_both_arms_have_settled() -> None:
    clock = FakeClock()
    falling = clock.arm("A", lambda n: max(100.0, 1000.0 - 300 * n))
    steady = clock.arm("B", lambda _: 100.0)
    found = warm_up(falling, steady, Sampling(warmup_seconds=60), clock=clock)
    assert found.stable
    assert found.calls == 6  # 1000 700 400 and then three times 100
    assert found.call_ms == 100.0


def test_warm_up_is_bounded_and_says_that_times_had_not_settled() -> None:
    clock = FakeClock()
    wild = clock.arm("A", lambda n: 100.0 * (1 + n % 2))
    found = warm_up(wild, clock.arm("B", lambda _: 100.0), Sampling(warmup_seconds=2), clock=clock)
    assert not found.stable
    assert 2.0 <= clock.now_ns / 1e9 < 2.5


@pytest.mark.parametrize("stable", [True, False])
def test_the_row_remembers_whether_times_had_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stable: bool
) -> None:
    monkeypatch.setattr(latency, "warm_up", lambda *_args: Warmup(3, 0.1, stable))
    model = write_tiny_lm(tmp_path) / "model.onnx"
    with OnnxRuntimeRunner(model, threads=1) as runner:
        row = measure_row(
            runner, runner, Shape("prefill", 1, 3), 32, Sampling(rounds=2, row_seconds=0)
        )
    assert row.settled is stable


def test_warm_up_has_three_windows_even_where_one_call_takes_too_long() -> None:
    clock = FakeClock()
    arms = clock.arm("A", lambda _: 5000.0), clock.arm("B", lambda _: 5000.0)
    found = warm_up(*arms, Sampling(warmup_seconds=1), clock=clock)
    assert (found.calls, found.stable) == (3, True)


def test_garbage_collection_is_off_while_the_clock_runs_and_on_again() -> None:
    seen: set[bool] = set()

    def call() -> None:
        seen.add(gc.isenabled())

    sample_pair(call, call, Sampling(rounds=2, row_seconds=0), call_ms=100)
    assert seen == {False}
    assert gc.isenabled()


def test_interruption_passes_and_leaves_garbage_collection_on() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_pair(interrupted, interrupted, Sampling(), call_ms=100)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("factor", "words"), [(1.0, {"same", "inconclusive"}), (1.05, {"slower"}), (0.9, {"faster"})]
)
def test_injected_delays_are_called_by_their_name(factor: float, words: set[str]) -> None:
    rng, clock = np.random.default_rng(0), FakeClock()

    def noisy(median_ms: float) -> Callable[[int], float]:
        """Jitter, and a machine whose pace wanders as time goes by."""
        return lambda _: (
            median_ms
            * (1 + 0.2 * np.sin(clock.now_ns / 3e9))
            * float(np.exp(0.03 * rng.standard_normal()))
        )

    arms = clock.arm("A", noisy(10.0)), clock.arm("B", noisy(10.0 * factor))
    sampling = Sampling(rounds=30, row_seconds=0, visit_ms=80)
    baseline, candidate = sample_pair(*arms, sampling, call_ms=10, clock=clock)
    assert verdict(paired_speedup(baseline, candidate, seed=0), rounds=30) in words


@pytest.mark.parametrize(
    "shape", [Shape("prefill", 1, 7), Shape("decode", 2, 1, 5)], ids=["prefill", "decode"]
)
def test_a_real_row_with_a_candidate_of_fewer_caches(tmp_path: Path, shape: Shape) -> None:
    models = [
        write_tiny_lm(tmp_path / "a", layers=(0, 1)) / "model.onnx",
        write_tiny_lm(tmp_path / "b", layers=(1,)) / "model.onnx",
    ]
    first, second = (OnnxRuntimeRunner(model, threads=1) for model in models)
    sampling = Sampling(rounds=3, row_seconds=0, visit_ms=0.1, warmup_seconds=0.5)
    with first, second:
        row = measure_row(first, second, shape, 32, sampling)
    assert (row.phase, row.batch) == (shape.phase, shape.batch)
    assert (row.sequence_length, row.past_length) == (shape.sequence_length, shape.past_length)
    assert (row.rounds, row.verdict) == (3, "inconclusive")
    assert len(row.baseline.samples_ms) == len(row.candidate.samples_ms)
    assert min(row.baseline.samples_ms) > 0


def test_inputs_have_positions_after_the_cache_and_a_full_mask(tmp_path: Path) -> None:
    shape = Shape("decode", 2, 1, 5)
    with OnnxRuntimeRunner(write_tiny_lm(tmp_path) / "model.onnx", threads=1) as runner:
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 32))
        assert has_cache(runner.inputs)
    assert inputs["attention_mask"].tolist() == [[1] * 6] * 2
    assert inputs["position_ids"].tolist() == [[5], [5]]
    assert inputs["past_key_values.0.key"].shape == (2, 2, 5, 4)
    assert inputs["past_key_values.0.key"].std() > 0.5
    assert inputs["input_ids"].max() < 32


def test_an_input_of_unknown_meaning_is_refused(tmp_path: Path) -> None:
    model = write_tiny_lm(tmp_path, extra_input="pixel_values") / "model.onnx"
    shape = Shape("prefill", 1, 3)
    with (
        OnnxRuntimeRunner(model, threads=1) as runner,
        pytest.raises(ComparisonError, match="'pixel_values'"),
    ):
        make_inputs(runner.inputs, shape, random_tokens(shape, 32))
