"""Requests, costs of sublayers on machines that exist in numbers only, and what they foretell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest

from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.choose.costs import measuring
from exporter.choose.costs.cost_runners import CostRunner
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize, Work
from exporter.choose.costs.measuring import CostSettings, fitted_rates, measure_on
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.timing import Effort
from exporter.compare.timing.subjects import Probe
from exporter.errors import CostError, SurgeryError, UsageError
from tests.made_tables import made_table
from tests.raising import raises
from tests.virtual_time import BusyMachine, Noise, Quiet, VirtualArm, VirtualTime


def test_a_request_is_read_as_it_is_written() -> None:
    assert RequestShape.parse("batch=1,prompt=512,new=128") == RequestShape(1, 512, 128)
    assert RequestShape.parse(" new = 4 , batch=2") == RequestShape(2, 512, 4)
    assert RequestShape.parse(str(RequestShape(3, 7, 0))) == RequestShape(3, 7, 0)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("batch=0", "malformed-request"),
        ("prompt=0", "malformed-request"),
        ("new=-1", "malformed-request"),
        ("past=512", "malformed-request"),
        ("prompt=1,prompt=2", "malformed-request"),
        ("prompt", "malformed-request"),
        ("prompt=1.5", "malformed-request"),
        ("", "malformed-request"),
    ],
)
def test_what_is_no_request_is_refused(text: str, code: str) -> None:
    with raises(UsageError, code, text.partition("=")[0]):
        RequestShape.parse(text)


@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (5, 2), (4, 3), (10, 100), (512, 128), (8, 0)])
def test_steps_are_summed_up_exactly_where_time_grows_with_the_cache(prompt: int, new: int) -> None:
    def step_ms(past: int) -> float:
        return 3.0 + 0.5 * past

    cells = RequestShape(1, prompt, new).cells(cached=True)
    (prefill, once), *steps = cells
    assert (prefill.phase, prefill.sequence_length, once) == ("prefill", prompt, 1.0)
    assert all(shape.phase == "decode" and shape.sequence_length == 1 for shape, _ in steps)
    total = sum(step_ms(shape.past_length) * count for shape, count in steps)
    # Sums of halves: exact in double precision.
    assert total == sum(step_ms(past) for past in range(prompt, prompt + new))
    assert len(steps) <= 2


def test_a_graph_without_a_cache_runs_its_input_alone() -> None:
    ((shape, count),) = RequestShape(2, 64, 0).cells(cached=False)
    assert (shape.phase, shape.batch, shape.sequence_length, count) == ("encode", 2, 64, 1.0)
    with raises(CostError, "no-kv-cache", 8):
        RequestShape(2, 64, 8).cells(cached=False)


TABLE = made_table(
    {
        (0, "attention"): {"none": 6.0, "bias": 5.5, "linear": 4.0},
        (0, "mlp"): {"none": 10.0, "linear": -1.0},
    }
)


def test_savings_add_up() -> None:
    assert TABLE.saved_ms((0, "attention")) == 6.0
    assert TABLE.saved_ms((0, "mlp"), "linear") == -1.0
    choices = {(0, "attention"): "linear", (0, "mlp"): "none"}
    assert TABLE.speedup(choices) == pytest.approx(100 / 86, rel=1e-12)
    assert TABLE.speedup({}) == 1.0
    with raises(CostError, "not-measured", "mlp 0", "bias"):
        TABLE.saved_ms((0, "mlp"), "bias")


def test_costs_that_save_everything_or_lack_a_sublayer_foretell_nothing() -> None:
    table = made_table({(0, "mlp"): {"none": 100.0}})
    assert table.speedup({(0, "mlp"): "none"}) is None
    assert table.speedup({(1, "mlp"): "none"}) is None


AT = RequestShape(batch=1, prompt=16, new=5)
LAYERS = 8
KEYS = (CacheSize(per_token=512.0),)
SIZES = GraphSizes(
    {
        (layer, kind): SublayerSize(size, size, 4 * size, 4 * size, caches=caches)
        for layer in range(LAYERS)
        for kind, size, caches in (("attention", 4000, KEYS), ("mlp", 9000, ()))
    },
    200_000, 800_000, rest=SublayerSize(50_000, 0, 200_000, 0), hidden=32, longest=64,
)  # fmt: skip
RATES = Work(2e-5, 9e-5, 3e-6, 7e-6)
"""Milliseconds of the made machine: a multiplication between positions takes longer than others."""


def true_ms(cell: Shape, cut: Mapping[Any, Any] | None = None) -> float:
    return sum(n * ms for n, ms in zip(SIZES.work(cell, cut), RATES, strict=True))


def request_ms(cut: Mapping[Any, Any] | None = None) -> float:
    return sum(count * true_ms(cell, cut) for cell, count in AT.cells(cached=True))


@dataclass
class WorkingArm(VirtualArm):
    """A model whose runs take what its work takes; a cut one saves ``extra`` times as much."""

    cut: Mapping[Any, Any] = field(default_factory=dict)
    extra: float = 1.0

    def probe(self, cell: Shape) -> Probe:
        self.call_ms = true_ms(cell) - self.extra * (true_ms(cell) - true_ms(cell, self.cut))
        return super().probe(cell)


@dataclass
class VirtualBench:
    """An engine on a machine that exists in numbers only."""

    noise: Noise = field(default_factory=Quiet)
    sha256: str = "a" * 64
    backend: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    on_gpu: bool = False
    threads: int = 1
    sizes: GraphSizes = SIZES
    time: VirtualTime = field(default_factory=VirtualTime)
    whole: Any = field(default_factory=lambda: Mock(folder=Mock(classifies_images=False)))
    extra: float = 1.0
    refused: str = ""
    loaded: list[list[str]] = field(default_factory=list)
    cuts: list[Any] = field(default_factory=list)

    @contextmanager
    def beside(self, runners: Mapping[str, Any]) -> Iterator[Mapping[str, WorkingArm]]:
        self.loaded.append([*runners])
        arms = {"baseline": WorkingArm(self.time, 0, self.noise)}
        for name, cut in runners.items():
            arms[name] = WorkingArm(self.time, 0, self.noise, cut=cut, extra=self.extra)
        yield arms

    @contextmanager
    def cut(self, plan: Any) -> Iterator[Any]:
        made: LoadedPlan = plan(Path())
        names = {(one.layer, one.kind): "none" for one in made.plan.deletions}
        if self.refused in {kind for _, kind in names}:
            raise SurgeryError("no")
        self.cuts.append(sorted(names))
        yield names


def measured(bench: VirtualBench, seconds: float = 2.0, **changes: Any) -> CostTable:
    options = {"at": AT, "threads": 1, "seconds": seconds, "clock": bench.time, **changes}
    return measure_on(cast("CostRunner", bench), CostSettings(**options))


def timed(bench: VirtualBench, seconds: float = 60.0, rounds: int | None = 2) -> Effort:
    return Effort(seconds=seconds, rounds=rounds, clock=bench.time, seed=0)


def test_on_a_quiet_machine_savings_are_what_they_are_and_one_model_is_loaded_once() -> None:
    bench = VirtualBench()
    table = measured(bench)
    assert bench.loaded == [[]]
    assert table.baseline_ms == pytest.approx(request_ms(), rel=1e-5)  # whole nanoseconds
    assert table.names == sorted(SIZES.sublayers)
    for name in table.names:
        for how in ("none", "bias", "linear"):
            truth = request_ms() - request_ms({name: how})
            assert table.saved_ms(name, how) == pytest.approx(truth, rel=0.02)
    cut = {(layer, "attention"): "none" for layer in range(4)}
    assert table.speedup(cut) == pytest.approx(request_ms() / request_ms(cut), rel=0.005)


@pytest.mark.parametrize("seed", range(3))
def test_on_a_busy_machine_the_shares_are_nearly_right(seed: int) -> None:
    table = measured(VirtualBench(BusyMachine(seed)), seconds=4.0)
    for kind in ("attention", "mlp"):
        cut = {(layer, kind): "none" for layer in range(4)}
        assert table.speedup(cut) == pytest.approx(request_ms() / request_ms(cut), rel=0.05)


def test_a_longer_context_makes_attentions_dearer() -> None:
    long, short = (measured(VirtualBench(), at=RequestShape(1, prompt, 5)) for prompt in (48, 12))
    shares = [t.saved_ms((0, "attention")) / t.saved_ms((0, "mlp")) for t in (long, short)]
    assert shares[0] > 1.2 * shares[1]


def test_what_one_length_cannot_tell_apart_costs_the_same_everywhere() -> None:
    work = SIZES.work(Shape("encode", 1, 16))._replace(cache_bytes=0.0)
    rates = fitted_rates([work], [10.0])
    assert rates.multiplications == pytest.approx(rates.pair_multiplications, rel=0.01)
    assert rates.multiplications * (work[0] + work[1]) == pytest.approx(10.0, rel=0.01)


def test_images_are_run_at_their_one_length() -> None:
    bench = VirtualBench(whole=Mock(folder=Mock(classifies_images=True)))
    assert len(measured(bench, at=RequestShape(1, 16, 0)).runs) == 1
    assert len(measured(VirtualBench(), at=RequestShape(1, 16, 0)).runs) == 3


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [({"at": RequestShape(1, 60, 5)}, "context-too-long", 65)],
)
def test_what_cannot_be_measured_is_refused(options: Any, code: str, field: object) -> None:
    with raises(CostError, code, field):
        measured(VirtualBench(), **options)
    assert measured(VirtualBench(), at=RequestShape(1, 60, 4))


def test_variants_are_timed_where_asked_for_and_used() -> None:
    bench = VirtualBench(extra=1.5)
    table = measured(bench, variants=timed(bench))
    assert bench.cuts == [[(n, kind) for n in (1, 3, 5, 7)] for kind in ("attention", "mlp")]
    assert bench.loaded == [[], ["cut"], ["cut"]]
    assert len(table.variants[0].rows) == len(AT.cells(cached=True))
    for kind in ("attention", "mlp"):
        truth = 1.5 * (request_ms() - request_ms({(0, kind): "none"}))
        assert table.saved_ms((0, kind)) == pytest.approx(truth, rel=0.01)
        replaced = request_ms({(0, kind): "linear"}) - request_ms({(0, kind): "none"})
        assert table.saved_ms((0, kind), "linear") == pytest.approx(truth - replaced, rel=0.05)


def test_a_variant_within_its_noise_is_not_used() -> None:
    plain = measured(VirtualBench())
    bench = VirtualBench(extra=-0.5)  # slower, as noise may have it
    table = measured(bench, variants=timed(bench))
    assert len(table.variants) == 2
    assert table.sublayers == plain.sublayers


def test_a_variant_that_cannot_be_cut_is_left_out() -> None:
    bench = VirtualBench(refused="mlp", extra=1.5)
    table, plain = measured(bench, variants=timed(bench)), measured(VirtualBench())
    assert [variant.sublayers[0].kind for variant in table.variants] == ["attention"]
    assert table.saved_ms((0, "mlp")) == plain.saved_ms((0, "mlp"))


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    kept = tmp_path / "costs.json"
    table = measured(VirtualBench(), kept=kept)
    again, more = VirtualBench(), VirtualBench(extra=1.5)
    assert measured(again, kept=kept, may_replace=False) == table == CostTable.read(kept)
    assert again.loaded == []
    with_variants = measured(more, kept=kept, variants=timed(more))
    assert measured(again, kept=kept, variants=timed(again)) == with_variants
    assert (len(more.cuts), again.loaded) == (2, [])


@pytest.mark.parametrize(
    ("change", "options", "code"),
    [
        ({"sha256": "b" * 64}, {}, "another-model"),
        ({}, {"at": RequestShape(1, 16, 6)}, "other-conditions"),
        ({}, {"threads": 2}, "other-conditions"),
        ({"provider": "CUDAExecutionProvider"}, {}, "other-conditions"),
    ],
)
def test_costs_under_other_conditions_are_measured_anew(
    tmp_path: Path, change: dict[str, Any], options: dict[str, Any], code: str
) -> None:
    kept = tmp_path / "costs.json"
    measured(VirtualBench(), kept=kept)
    bench, before = VirtualBench(**change), kept.read_bytes()
    with raises(CostError, code, kept):
        measured(bench, kept=kept, **options, may_replace=False)
    assert (kept.read_bytes(), bench.loaded) == (before, [])
    table = measured(bench, kept=kept, **options)
    assert bench.loaded == [[]]
    assert CostTable.read(kept) == table


def test_threads_are_the_cores_unless_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "default_threads", lambda: 3)
    assert measured(VirtualBench(), threads=None).environment.threads == 3
    assert measured(VirtualBench(threads=7), threads=2).environment.threads == 2


def test_what_cannot_be_replaced_has_no_cost_so() -> None:
    plain = {name: SublayerSize(9, 9, 9, 9, takes_linear=False) for name in SIZES.sublayers}
    for hidden, hows in ((8, {"none", "bias"}), (None, {"none"})):
        bench = VirtualBench(sizes=GraphSizes(plain, 99, 99, hidden=hidden))
        table = measured(bench, at=RequestShape(1, 16, 0))
        assert {how for one in table.sublayers for how in one.saved_ms} == hows


def test_a_windowed_attention_looks_no_further() -> None:
    windowed = SublayerSize(9, 9, 9, 9, caches=(CacheSize(8.0, window=16),))
    assert [windowed.reach(n) for n in (4, 100)] == [4, 16]
    assert SublayerSize(9, 9, 9, 9, caches=(CacheSize(fixed=64),)).reach(100) == 0
    assert SublayerSize(9, 9, 9, 9).reach(100) == 100
