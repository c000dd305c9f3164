"""Requests, costs of sublayers on machines that exist in numbers only, and what they foretell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest

from exporter.artifacts import FEWEST_ROUNDS
from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.choose.costs.measuring import CostRunner, CostSettings, Effort, measure_on
from exporter.choose.costs.table import CostTable, RequestShape
from exporter.choose.costs.weighing import CacheSize, GraphSizes, SublayerSize
from exporter.compare.timing.subjects import Probe
from exporter.errors import CostError, SurgeryError, UsageError
from graph_passes.types import Replacement, SublayerRef
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


def true_ms(cell: Shape, cut: Mapping[Any, Any] | None = None) -> float:
    """On the made machine: a multiplication between positions takes longer than others."""
    tokens, context, cut = cell.batch * cell.sequence_length, cell.total_length, cut or {}
    gone = [kind for _, kind in cut]
    attentions, mlps = LAYERS - gone.count("attention"), LAYERS - gone.count("mlp")
    added = sum({"none": 0, "bias": 32, "linear": 32 * 33}[how] for how in cut.values())
    numbers = 50_000 + 4000 * attentions + 9000 * mlps + added
    pairs = tokens * context * 62.5 * attentions  # 4 matrices of 4000 numbers are 31.25 wide
    kept = cell.batch * context * 512 * attentions
    return 2e-5 * tokens * numbers + 9e-5 * pairs + 3e-6 * 4 * numbers + 7e-6 * kept


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
    provider: str = "CPUExecutionProvider"
    images: bool = False
    threads: int = 1
    sizes: GraphSizes = SIZES
    time: VirtualTime = field(default_factory=VirtualTime)
    extra: float = 1.0
    refused: str = ""
    loaded: list[list[str]] = field(default_factory=list)
    cuts: list[Any] = field(default_factory=list)

    @property
    def whole(self) -> Any:
        running = Mock(backend="onnxruntime", provider=self.provider)
        folder, facts = Mock(classifies_images=self.images), Mock(sha256=self.sha256)
        return Mock(runner=running, folder=folder, facts=facts)

    @contextmanager
    def beside(self, runners: Mapping[str, Any]) -> Iterator[Mapping[str, WorkingArm]]:
        self.loaded.append([*runners])
        arms = {"baseline": WorkingArm(self.time, 0, self.noise)}
        for name, cut in runners.items():
            arms[name] = WorkingArm(self.time, 0, self.noise, cut=cut, extra=self.extra)
        yield arms

    @contextmanager
    def cut(self, plan: LoadedPlan) -> Iterator[Any]:
        names = {(one.layer, one.kind): "none" for one in plan.plan.deletions}
        if self.refused in {kind for _, kind in names}:
            raise SurgeryError("no")
        self.cuts.append(sorted(names))
        yield names


def measured(bench: VirtualBench, seconds: float = 2.0, **changes: Any) -> CostTable:
    options = {"at": AT, "threads": 1, "seconds": seconds, "clock": bench.time, **changes}
    return measure_on(cast("CostRunner", bench), CostSettings(**options))


def timed(bench: VirtualBench, seconds: float = 60.0, rounds: int = FEWEST_ROUNDS) -> Effort:
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


def test_images_are_run_at_their_one_length() -> None:
    bench = VirtualBench(images=True)
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


@pytest.mark.parametrize(
    ("rounds", "is_used"), [(FEWEST_ROUNDS, True), (FEWEST_ROUNDS - 1, False), (2, False)]
)
def test_few_rounds_prove_nothing(rounds: int, is_used: bool) -> None:
    bench = VirtualBench(extra=1.5)
    table = measured(bench, variants=timed(bench, rounds=rounds))
    assert [variant.is_resolved for variant in table.variants] == [is_used, is_used]
    assert (table.sublayers != measured(VirtualBench()).sublayers) == is_used


def test_a_variant_that_cannot_be_cut_is_left_out() -> None:
    bench = VirtualBench(refused="mlp", extra=1.5)
    table, plain = measured(bench, variants=timed(bench)), measured(VirtualBench())
    assert [variant.sublayers[0].kind for variant in table.variants] == ["attention"]
    assert table.saved_ms((0, "mlp")) == plain.saved_ms((0, "mlp"))


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    kept, again = tmp_path / "costs.jsonl", VirtualBench()
    table = measured(VirtualBench(), kept=kept)
    assert measured(again, kept=kept) == table
    assert again.loaded == []


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"sha256": "b" * 64}, {}),
        ({}, {"at": RequestShape(1, 16, 6)}),
        ({}, {"threads": 2}),
        ({"provider": "CUDAExecutionProvider"}, {}),
    ],
)
def test_costs_under_other_conditions_are_measured_anew(
    tmp_path: Path, change: dict[str, Any], options: dict[str, Any]
) -> None:
    kept, bench = tmp_path / "costs.jsonl", VirtualBench(**change)
    measured(VirtualBench(), kept=kept)
    table = measured(bench, kept=kept, **options)
    assert bench.loaded == [[]]
    assert measured(bench, kept=kept, **options) == table
    assert bench.loaded == [[]]


def test_what_cannot_be_replaced_has_no_cost_so() -> None:
    plain = {name: SublayerSize(9, 9, 9, 9, takes_linear=False) for name in SIZES.sublayers}
    for hidden, hows in ((8, {"none", "bias"}), (None, {"none"})):
        bench = VirtualBench(sizes=GraphSizes(plain, 99, 99, hidden=hidden))
        table = measured(bench, at=RequestShape(1, 16, 0))
        assert {how for one in table.sublayers for how in one.saved_ms} == hows


KEPT = CacheSize(per_token=10.0)
ATTENTION, MLP = SublayerRef(0, "attention"), SublayerRef(0, "mlp")


@pytest.mark.parametrize(
    ("cache", "cell", "cut", "work"),
    [  # of 16 tokens, 8 a sequence; a step is one token of each of 2 sequences after 7
        (KEPT, "prefill", {}, (36_800, 5120, 9200 + 700, 160)),
        (KEPT, "prefill", {ATTENTION: "none"}, (24_000, 0, 6000 + 400, 0)),
        (KEPT, "prefill", {ATTENTION: "linear"}, (25_760, 0, 6440 + 400, 0)),
        (KEPT, "prefill", {MLP: "none"}, (20_800, 5120, 5200 + 500, 160)),
        (KEPT, "prefill", {MLP: "bias"}, (20_960, 5120, 5240 + 500, 160)),
        (KEPT, "decode", {}, (4600, 640, 9200 + 700, 160)),
        (CacheSize(10.0, window=6), "prefill", {}, (36_800, 3840, 9900, 120)),
        (CacheSize(10.0, window=6), "decode", {ATTENTION: "none"}, (3000, 0, 6400, 0)),
        (CacheSize(fixed=640, window=64), "prefill", {}, (36_800, 5120, 9900, 1280)),
        (CacheSize(fixed=640, window=64), "decode", {}, (4600, 640, 9900, 1280)),
        (CacheSize(fixed=640, window=64), "decode", {ATTENTION: "none"}, (3000, 0, 6400, 0)),
        (CacheSize(fixed=640), "prefill", {}, (36_800, 0, 9900, 1280)),  # a state
        (CacheSize(fixed=640), "prefill", {ATTENTION: "none"}, (24_000, 0, 6400, 0)),
    ],
)
def test_what_a_run_does_is_counted(
    cache: CacheSize, cell: Any, cut: dict[SublayerRef, Replacement], work: tuple[int, ...]
) -> None:
    shape = Shape(cell, 2, 8) if cell == "prefill" else Shape(cell, 2, 1, 7)
    result = GraphSizes(
        {
            ATTENTION: SublayerSize(800, 800, 3200, 3200, caches=(cache,), operators=3),
            MLP: SublayerSize(1000, 1000, 4000, 4000, operators=2),
        },
        2300, 9200, SublayerSize(500, 500, 2000, 2000, operators=2), 10, operator_bytes=100,
    ).work(shape, cut)  # fmt: skip
    assert result == work


@pytest.mark.parametrize(
    ("cell", "work"),
    [  # a token takes 1 of 4 experts, which have 800 of 1000 numbers: 200 + 200
        (Shape("decode", 1, 1, 7), (500 + 400, 2000 + 800 + 3200 / 4)),
        (Shape("decode", 2, 1, 7), (2 * 900, 2000 + 800 + 3200 / 2)),
        (Shape("prefill", 2, 8), (16 * 900, 2000 + 800 + 3200)),
    ],
)
def test_experts_that_no_token_takes_are_neither_multiplied_nor_read(
    cell: Shape, work: tuple[float, float]
) -> None:
    mlp = SublayerSize(1000, 1000, 4000, 4000, expert_parameters=800, chosen=0.25)
    sizes = GraphSizes({MLP: mlp}, 1500, 6000, SublayerSize(500, 500, 2000, 2000), 10)
    result, cut = sizes.work(cell), sizes.work(cell, {MLP: "none"})
    assert (result.multiplications, result.weight_bytes) == work
    assert cut[:3:2] == (500 * cell.batch * cell.sequence_length, 2000)
