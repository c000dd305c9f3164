"""The timing harness on arms that move a clock of their own, and on tiny real models."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest

from exporter.artifacts import LatencyRow
from exporter.artifacts.latency import Shape
from exporter.compare.arms import ComparedArm
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.row import MeasuredRow, Rounds
from exporter.compare.timing.statistics import (
    CHUNKS,
    ONE_LOOK,
    SequentialTest,
    as_rounds,
    estimate,
    log_ratios,
    noise_floor,
)
from exporter.compare.timing.subjects import CallProbe, RunnerArm, loaded, one_clock, warm_up
from exporter.engines.runners.base import BoundCall
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import has_cache, make_inputs, random_tokens
from exporter.errors import ComparisonError
from exporter.models.graph_facts import read_facts
from exporter.models.model_folder import find_model
from exporter.progress import QUIET
from tests.raising import raises
from tests.text_graphs import write_tiny_lm
from tests.virtual_time import (
    BusyMachine,
    Quiet,
    VirtualArm,
    VirtualCell,
    VirtualTime,
    timed,
    virtual_pair,
)


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Each row collects garbage; conftest.py puts aside what was imported before."""
    importlib.import_module("scipy.stats")


class FakeClock(VirtualTime):
    """Time that only the stub arms move, and who moved it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def probe(self, name: str, milliseconds: Callable[[int], float]) -> CallProbe:
        """A stub whose n-th call takes ``milliseconds(n)``."""
        made = 0

        def call() -> None:
            nonlocal made
            self.calls.append(name)
            self.now_ns += round(milliseconds(made) * 1e6)
            made += 1

        return CallProbe(BoundCall(call))


def take(clock: FakeClock, probes: list[CallProbe], calls: int, rounds: int) -> list[Any]:
    taker = Rounds(probes, calls, np.random.default_rng(0), clock)
    return [taker.take() for _ in range(rounds)]


def test_a_run_that_takes_no_time_is_refused() -> None:
    clock = FakeClock()
    with raises(ComparisonError, "no-times"):
        take(clock, [clock.probe("A", float), clock.probe("B", lambda _: 50.0)], 1, 1)


def test_rounds_run_forwards_and_backwards_in_an_order_that_is_drawn() -> None:
    clock = FakeClock()
    probes = [clock.probe("A", lambda _: 100.0), clock.probe("B", lambda _: 50.0)]
    rounds = take(clock, probes, 1, 40)
    orders = Counter("".join(clock.calls[4 * n : 4 * n + 4]) for n in range(40))
    assert set(orders) == {"ABBA", "BAAB"}
    assert min(orders.values()) >= 10
    for times in rounds:
        np.testing.assert_array_equal(times[..., 0], [[100.0, 100.0], [50.0, 50.0]])


def test_a_row_has_one_clock() -> None:
    """A device's time beside a host's would be another thing."""
    clock = FakeClock()

    def by_device(device_ms: float) -> CallProbe:
        host = clock.probe("engine", lambda _: 7.0)
        return CallProbe(BoundCall(lambda: host.sample(clock) and None, lambda: device_ms))

    both = [by_device(3.0), by_device(4.0)]
    assert one_clock(both) == "device"
    assert [probe.sample(clock) for probe in both] == [(3.0,), (4.0,)]
    mixed = [by_device(3.0), clock.probe("other", lambda _: 5.0)]
    assert one_clock(mixed) == "host"
    assert [probe.sample(clock) for probe in mixed] == [(7.0,), (5.0,)]


def test_short_calls_come_in_turns_whose_first_is_not_timed() -> None:
    clock = FakeClock()

    def slow_after_the_other(_: int) -> float:
        return 10.0 if clock.calls[-2:-1] != clock.calls[-1:] else 5.0

    probes = [clock.probe("A", slow_after_the_other), clock.probe("B", lambda _: 5.0)]
    (times,) = take(clock, probes, 4, 1)
    assert "".join(clock.calls) in ("A" * 5 + "B" * 10 + "A" * 5, "B" * 5 + "A" * 10 + "B" * 5)
    assert times.shape == (2, 8, 1)
    assert times[:, 1:4].tolist() == np.full((2, 3, 1), 5.0).tolist()


@pytest.mark.parametrize(
    ("call_ms", "seconds", "stable", "calls"),
    [
        (lambda n: max(100.0, 1000.0 - 300 * n), 60, True, 6),  # 1000 700 400, three times 100
        (lambda n: 100.0 * (1 + n % 2), 60, True, 8),  # noise without a trend
        (lambda n: 100.0 * 1.1**n, 2, False, 9),  # bounded by the time
        (lambda _: 5000.0, 1, False, 1),  # one window even where one call takes too long
    ],
)
def test_warm_up_ends_when_all_arms_have_settled_or_its_time_is_up(
    call_ms: Callable[[int], float], seconds: float, stable: bool, calls: int
) -> None:
    clock = FakeClock()
    probes = [clock.probe("A", call_ms), clock.probe("B", lambda _: 100.0)]
    result = warm_up(probes, seconds=seconds, clock=clock)
    assert (result.stable, result.calls) == (stable, calls)
    assert clock.now_ns / 1e9 < max(seconds + 0.6, 5.2)


@pytest.mark.parametrize(
    ("factor", "word"), [(1.0, "same"), (1.05, "slower"), (0.9, "faster"), (1.012, "slower")]
)
def test_on_a_quiet_machine_a_look_is_enough(factor: float, word: str) -> None:
    row = timed(TimingBudget(), slowdown=factor)
    assert (row.verdict, row.stopped) == (word, "narrow")
    assert row.seconds == pytest.approx(60 * 6 / CHUNKS, rel=0.1)
    assert row.loads == 6
    assert row.speedup.ratio == pytest.approx(1 / factor, rel=1e-6)
    assert row.rounds % row.loads == 0


def test_a_budget_too_short_for_a_verdict_is_said() -> None:
    row = timed(TimingBudget(seconds=2), BusyMachine(0, scatter=0.2), slowdown=1.03)
    assert (row.verdict, row.stopped) == ("inconclusive", "budget")
    assert row.verdict_interval is not None
    assert row.verdict_interval[0] < row.speedup.ratio < row.verdict_interval[1]


@pytest.mark.parametrize("reload", [True, False])
def test_a_budget_shorter_than_one_round_takes_two_and_settles_nothing(reload: bool) -> None:
    row = timed(TimingBudget(seconds=0.05, reload=reload), slowdown=1.5)
    assert (row.verdict, row.stopped) == ("inconclusive", "budget")
    assert row.rounds == 2
    assert row.seconds > 0.05


@pytest.mark.parametrize(
    ("rounds", "loads"),
    [(2, 1), (5, 1), (6, 6), (7, 7), (13, 13), (17, 16), (32, 16), (34, 16), (37, 16)],
)
def test_a_number_of_rounds_is_taken_as_it_was_asked_for(rounds: int, loads: int) -> None:
    row = timed(TimingBudget(rounds=rounds))
    assert (row.rounds, row.loads, row.stopped) == (rounds, loads, "rounds")


class Builds(VirtualArm):
    """An arm of several builds, the second of which is slower."""

    def use_build(self, number: int) -> None:
        self._luck = 1.1 if number % 3 == 1 else 1.0


def with_builds(builds: int, budget: TimingBudget) -> tuple[LatencyRow, list[Any]]:
    """A row of which an arm has builds, and that arm's rounds by build."""
    time = VirtualTime()
    arms = {"baseline": VirtualArm(time, 20.0, Quiet()), "candidate": Builds(time, 20.0, Quiet())}
    arms["candidate"].builds = builds  # type: ignore[misc]
    (row,) = measure_rows(arms, [VirtualCell()], budget, clock=time)
    return row, np.array_split(as_rounds(row.candidate, row.rounds), row.builds)


@pytest.mark.parametrize("rounds", [2, 3, 5, 6, 17, 19, 20, 37])
@pytest.mark.parametrize("builds", [2, 3])
def test_several_builds_share_the_rounds_that_were_asked_for(rounds: int, builds: int) -> None:
    row, by_build = with_builds(builds, TimingBudget(rounds=rounds))
    assert (row.rounds, row.builds, row.loads) == (rounds, min(builds, rounds), 1)
    for times, expected in zip(by_build, [20.0, 22.0, 20.0], strict=False):
        np.testing.assert_allclose(times, expected, rtol=1e-9)


LOADS: dict[str, Any] = {"lottery": 0.05, "later": 0.1}
"""Equal arms that loading makes unlike."""


@pytest.mark.parametrize("seed", range(8))
def test_rounds_that_divide_into_no_equal_parts_tell_how_loads_differ(seed: int) -> None:
    """17 rounds were one part once, and its interval knew one load of each arm."""
    low, high = timed(TimingBudget(rounds=17), seed=seed, **LOADS).speedup.ci95
    assert low < 1 < high


@pytest.mark.parametrize(("reload", "least", "most"), [(True, 0, 0), (False, 6, 8)])
def test_equal_arms_that_loading_makes_unlike_are_not_told_apart(
    reload: bool, least: int, most: int
) -> None:
    words = Counter(timed(TimingBudget(reload=reload), seed=n, **LOADS).verdict for n in range(8))
    assert least <= words["faster"] + words["slower"] <= most, words


def test_arms_are_loaded_in_turns_the_other_way_round() -> None:
    time, arms = virtual_pair(Quiet())
    seen = []

    def look() -> None:
        seen.append(arms["baseline"].loads[0] is arms["baseline"])

    measure_rows(arms, [VirtualCell()], TimingBudget(), clock=time, after_chunk=look)
    assert seen == [True, False] * 3


def test_equal_arms_differ_by_more_than_the_noise_floor_in_hardly_any_session() -> None:
    rng = np.random.default_rng(1)
    beyond = 0
    for _ in range(400):
        times = 10 * np.exp(0.05 * rng.standard_normal((2, 100, 2)))
        result = estimate(log_ratios(*times, turns=2))
        beyond += abs(result.log_ratio) > math.log(noise_floor(times[0]))
    assert 8 <= beyond <= 32  # 5 %: a floor that never yields would hold every word back


def test_looks_spend_no_more_than_one_look_might() -> None:
    for chunks in (6, 7, 10, CHUNKS):
        looks = SequentialTest(chunks)
        spent = [looks.spend(n) for n in range(1, chunks) if looks.due(n)] + [looks.rest()]
        assert sum(item.equal for item in spent) == pytest.approx(ONE_LOOK.equal, rel=1e-9)
        assert sum(item.threshold for item in spent) == pytest.approx(0.1, rel=1e-9)
        assert all(item.equal > 0 for item in spent)


class Kept:
    """A store that may be cut short."""

    def __init__(self) -> None:
        self.chunks: dict[int, Any] = {}

    def find(self, name: str) -> Any:
        return self.chunks.get(int(name.rpartition("#")[2]))

    def keep(self, name: str, value: Any) -> None:
        self.chunks[int(name.rpartition("#")[2])] = value

    def cut_short(self) -> None:
        self.chunks = dict([*self.chunks.items()][:3])


@pytest.mark.parametrize("reload", [True, False])
def test_a_row_that_goes_on_loads_its_arms_as_it_began(reload: bool) -> None:
    memory, loads = Kept(), 16 if reload else 1
    assert timed(TimingBudget(rounds=32, reload=reload), store=memory).loads == loads
    memory.cut_short()
    # As if loading had got faster or slower.
    again = timed(TimingBudget(rounds=32, reload=not reload), store=memory)
    assert (again.loads, again.rounds) == (loads, 32)


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


class CountedRunner(OnnxRuntimeRunner):
    """Knows how many of its kind are entered at once."""

    entered: ClassVar[set[int]] = set()
    most: ClassVar[int] = 0
    loads: ClassVar[Counter[int]] = Counter()

    def __enter__(self) -> Self:
        CountedRunner.entered.add(id(self))
        CountedRunner.loads[id(self)] += 1
        CountedRunner.most = max(CountedRunner.most, len(CountedRunner.entered))
        return super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        CountedRunner.entered.discard(id(self))
        super().__exit__(*exc_info)


@pytest.fixture
def three(tmp_path: Path) -> ComparedArm:
    """An arm of three builds."""
    model = write_tiny_lm(tmp_path) / "model.onnx"
    runners = tuple(CountedRunner(model, threads=1) for _ in range(3))
    return ComparedArm(runners, find_model(model), read_facts(model))


def test_one_build_of_each_arm_is_loaded_at_a_time(three: ComparedArm) -> None:
    other = OnnxRuntimeRunner(three.builds[0].model, threads=1)
    with loaded([three.builds, [other]], QUIET):
        arms = {"a": RunnerArm(three.builds, 32), "b": RunnerArm([other], 32)}
        (row,) = measure_rows(arms, [Shape("prefill", 1, 4)], TimingBudget(rounds=6))
    assert row.builds == 3
    assert CountedRunner.most == 1
    assert all(CountedRunner.loads[id(runner)] for runner in three.builds)
    assert not CountedRunner.entered


def test_rows_end_together_when_someone_has_enough() -> None:
    time, arms = virtual_pair(Quiet(), slowdown=0.8)
    cells, result = [VirtualCell(past_length=128), VirtualCell(past_length=256)], []

    def enough(rows: Sequence[MeasuredRow]) -> bool:
        result.append([len(row.chunks) for row in rows])
        return len(result) == 3

    sampling = TimingBudget(seconds=60, reload=False)
    rows = measure_rows(arms, cells, sampling, clock=time, enough=enough)
    assert result == [[1, 1], [2, 2], [3, 3]]
    assert [row.stopped for row in rows] == ["narrow", "narrow"]
    # Nobody has: the time is used up, however clear the difference is.
    time, arms = virtual_pair(Quiet(), slowdown=0.8)
    never = measure_rows(arms, cells[:1], sampling, clock=time, enough=lambda _: False)
    assert never[0].rounds > 2 * rows[0].rounds
    alone = measure_rows(arms, cells[:1], sampling, clock=time)
    assert alone[0].rounds < never[0].rounds


def test_a_measurement_ends_when_all_of_its_time_is_up() -> None:
    late = timed(TimingBudget(wall_seconds=0.0), slowdown=1.5)
    free = timed(TimingBudget(), slowdown=1.5)
    assert (late.stopped, free.stopped) == ("budget", "narrow")
    assert 2 <= late.rounds < free.rounds


def test_two_rounds_that_agree_on_average_are_not_certain() -> None:
    few = estimate(np.array([[0.1, 0.3], [0.3, 0.1]]))
    low, high = few.interval()
    assert low < 1 < high
    assert few.degrees == 1
