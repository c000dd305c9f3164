"""Costs of sublayers, measured on machines that exist in numbers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from exporter.choose.costs import measuring
from exporter.choose.costs.graph_sizes import GraphSizes, SublayerSize
from exporter.choose.costs.measuring import CostSettings, measure_on
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostTable, Variant, groups_of, variants
from exporter.choose.costs.timing import Effort
from exporter.compare.timing.subjects import CallProbe, Probe, TimedCell
from exporter.engines.runners.base import BoundCall
from exporter.errors import CostError, SurgeryError, UsageError
from tests.raising import raises
from tests.virtual_time import BusyMachine, Noise, Quiet, VirtualArm, VirtualTime

AT = RequestShape(batch=1, prompt=16, new=5)
FIXED_MS = {"prefill": 30.0, "decode": 4.0}
EACH_MS = {"attention": {"prefill": 6.0, "decode": 0.5}, "mlp": {"prefill": 9.0, "decode": 1.0}}
REPLACED_MS = {"none": 0.0, "bias": 0.1, "linear": 0.5}
LAYERS = 8


def saved_ms(kind: str, replacement: str = "none") -> float:
    """What one sublayer saves of the request in truth."""
    whole = EACH_MS[kind]["prefill"] + AT.new * EACH_MS[kind]["decode"]
    return whole - (1 + AT.new) * REPLACED_MS[replacement]


BASELINE_MS = (
    FIXED_MS["prefill"] + AT.new * FIXED_MS["decode"]
    + LAYERS * (saved_ms("attention") + saved_ms("mlp"))
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Each row collects garbage, which takes long where much was imported since the last freeze."""
    for late in ("scipy.stats", "exporter.engines.runners.onnxruntime", "exporter.compare.kinds"):
        import_module(late)


@dataclass
class CostlyArm(VirtualArm):
    """A model whose calls take what its sublayers take."""

    variant: Variant | None = None

    def probe(self, cell: TimedCell) -> Probe:
        call_ms = self._call_ms(cell.phases[0])

        def call() -> None:
            factor = self.noise.factor(self.time.now_ns / 1e9)
            self.time.now_ns += round(call_ms * factor * 1e6)

        return CallProbe(BoundCall(call))

    def _call_ms(self, phase: str) -> float:
        own = sum(LAYERS * item[phase] for item in EACH_MS.values())
        for member in self.variant.members if self.variant else ():
            own -= EACH_MS[member.kind][phase] - REPLACED_MS[self.variant.replacement]
        return FIXED_MS[phase] + own


def sizes_of(layers: int = LAYERS) -> GraphSizes:
    result = {"attention": 40, "mlp": 90}
    return GraphSizes(
        {
            (layer, kind): SublayerSize(size, size, 4 * size, 4 * size, signature=kind)
            for layer in range(layers)
            for kind, size in result.items()
        },
        10_000, 40_000, hidden=8, longest=64,
    )  # fmt: skip


@dataclass
class VirtualBench:
    """An engine on a machine that exists in numbers only."""

    noise: Noise = field(default_factory=Quiet)
    sha256: str = "a" * 64
    backend: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    on_gpu: bool = False
    threads: int = 1
    sizes: GraphSizes = field(default_factory=lambda: sizes_of())
    time: VirtualTime = field(default_factory=VirtualTime)
    timed: list[Variant] = field(default_factory=list)
    open: int = 0
    refused: str = ""
    dies_at: int | None = None

    def __post_init__(self) -> None:
        self.sizes = GraphSizes(**{**vars(self.sizes), "rest_caches": (None,)})  # has a cache

    @contextmanager
    def arms(self, variant: Variant) -> Iterator[Mapping[str, CostlyArm]]:
        if variant.members[0].kind == self.refused:
            raise SurgeryError("no")
        self.timed.append(variant)
        if self.dies_at == len(self.timed):
            raise KeyboardInterrupt
        self.open += 2
        assert self.open <= 2
        yield {
            "baseline": CostlyArm(self.time, 0, self.noise),
            "candidate": CostlyArm(self.time, 0, self.noise, variant=variant),
        }
        self.open -= 2

    def effort(self, **changes: Any) -> Effort:
        return Effort(**{"seconds": 60.0, "clock": self.time, "seed": 0, **changes})


def measured(cost_runner: VirtualBench, **changes: Any) -> CostTable:
    """In two rounds each: enough where nothing disturbs, and for all but the numbers."""
    options = {"at": AT, "threads": 1, "effort": cost_runner.effort(rounds=2), **changes}
    names = options.pop("names", None)
    return measure_on(cost_runner, CostSettings(**options), names)


def test_on_a_quiet_machine_costs_are_what_they_are() -> None:
    table = measured(VirtualBench())
    # Times are whole nanoseconds.
    assert table.baseline_ms == pytest.approx(BASELINE_MS, rel=1e-6)
    for name in table.names:
        for replacement in REPLACED_MS:
            truth = saved_ms(name[1], replacement)
            assert table.saved_ms(name, replacement) == pytest.approx(truth, rel=1e-4)
    choices = {(0, "attention"): "linear", (3, "attention"): "none", (2, "mlp"): "bias"}
    left = BASELINE_MS - sum(saved_ms(name[1], how) for name, how in choices.items())
    assert table.speedup(choices) == pytest.approx(BASELINE_MS / left, rel=1e-4)


def test_a_request_is_the_sum_of_its_cells() -> None:
    table = measured(VirtualBench())
    counts = [count for _, count in AT.cells(cached=True)]
    cells = [table.of_cell(number) for number in range(len(counts))]
    assert table.baseline_ms == pytest.approx(
        sum(n * cell.baseline_ms for n, cell in zip(counts, cells, strict=True)), rel=1e-6
    )
    for name in table.names[:2]:
        saved = sum(n * cell.saved_ms(name) for n, cell in zip(counts, cells, strict=True))
        assert table.saved_ms(name) == pytest.approx(saved, rel=1e-4)
    with raises(CostError, "no-such-cell", str(len(counts))):
        table.of_cell(len(counts))


@pytest.mark.parametrize("seed", range(2))
def test_on_a_busy_machine_they_are_known_as_well_as_the_table_says(seed: int) -> None:
    cost_runner = VirtualBench(BusyMachine(seed))
    effort = cost_runner.effort(seconds=24)
    table = measured(cost_runner, names=[(0, "mlp")], replacements=("linear",), effort=effort)
    slower = table.baseline_ms / BASELINE_MS  # than when nothing disturbs
    assert 1.2 < slower < 4
    for replacement in ("none", "linear"):
        result, error = table.groups[0].each_ms(replacement)
        # A t of some 5 degrees of freedom is below 4.8 in 99.5 of 100 cases.
        assert abs(result - slower * saved_ms("mlp", replacement)) <= 4.8 * error
        assert error < 0.2 * result


def test_each_group_is_cut_by_half_once_with_each_replacement_and_by_a_quarter() -> None:
    cost_runner = VirtualBench()
    measured(cost_runner)
    result = [
        (t.members[0].kind, t.replacement, [m.layer for m in t.members]) for t in cost_runner.timed
    ]
    assert result == [
        (kind, replacement, layers)
        for kind in EACH_MS
        for replacement, layers in [
            ("none", [1, 3, 5, 7]), ("bias", [1, 3, 5, 7]), ("linear", [1, 3, 5, 7]),
            ("none", [2, 6]),
        ]
    ]  # fmt: skip


def test_only_the_groups_of_named_sublayers_are_measured() -> None:
    cost_runner = VirtualBench()
    table = measured(cost_runner, names=[(3, "mlp")], replacements=())
    assert {t.members[0].kind for t in cost_runner.timed} == {"mlp"}
    assert table.names == [(layer, "mlp") for layer in range(LAYERS)]
    with raises(CostError, "not-measured", "attention 0"):
        table.saved_ms((0, "attention"))
    with raises(CostError, "sublayer-missing", "mlp 99"):
        measured(cost_runner, names=[(99, "mlp")])
    with raises(CostError, "nothing-asked"):
        measured(cost_runner, names=[])


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    kept = tmp_path / "costs.json"
    first = VirtualBench()
    table = measured(first, kept=kept, replacements=("none",))
    assert len(first.timed) == 4
    second = VirtualBench()
    again = measured(second, kept=kept, replacements=("none",), may_replace=False)
    assert again.groups == table.groups
    assert second.timed == []
    more = VirtualBench()
    measured(more, kept=kept, replacements=("none", "bias"))
    assert [t.replacement for t in more.timed] == ["bias", "bias"]
    assert CostTable.read(kept).saved_ms((0, "mlp"), "bias")
    # Nor is anything lost that isn't asked for.
    measured(more, kept=kept, replacements=("linear",), names=[(0, "mlp")])
    table = CostTable.read(kept)
    assert table.saved_ms((0, "attention"), "bias")
    assert table.saved_ms((0, "mlp"), "bias") != table.saved_ms((0, "mlp"), "linear")


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    kept = tmp_path / "costs.json"
    with pytest.raises(KeyboardInterrupt):
        measured(VirtualBench(dies_at=3), kept=kept, replacements=())
    cost_runner = VirtualBench()
    table = measured(cost_runner, kept=kept, replacements=())
    assert len(cost_runner.timed) == 4 - 2
    assert table.saved_ms((0, "mlp")) == pytest.approx(saved_ms("mlp"), rel=1e-4)


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
    few = {"names": [(0, "mlp")], "replacements": ["linear"], "kept": kept}
    measured(VirtualBench(), **few)
    cost_runner, before = VirtualBench(**change), kept.read_bytes()
    with raises(CostError, code, kept):
        measured(cost_runner, **few, **options, may_replace=False)
    assert (kept.read_bytes(), cost_runner.timed) == (before, [])
    table = measured(cost_runner, **few, **options)
    assert len(cost_runner.timed) == 3
    assert CostTable.read(kept) == table


def test_threads_are_those_of_before_or_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "default_threads", lambda: 3)
    kept = tmp_path / "costs.json"
    few = {"names": [(0, "mlp")], "replacements": (), "kept": kept, "threads": None}
    assert measured(VirtualBench(), **few).environment.threads == 3
    cost_runner = VirtualBench(threads=7)
    assert measured(cost_runner, **few).environment.threads == 3
    assert cost_runner.timed == []


def test_a_group_that_cannot_be_cut_is_left_out_and_told() -> None:
    table = measured(VirtualBench(refused="mlp"), replacements=())
    assert table.saved_ms((0, "attention")) == pytest.approx(saved_ms("attention"), rel=1e-4)
    with raises(CostError, "replacement-not-measured", "mlp 0", "none"):
        table.saved_ms((0, "mlp"))
    with raises(CostError, "nothing-measured"):
        measured(VirtualBench(refused="mlp"), names=[(0, "mlp")])


def test_what_cannot_be_asked_is_refused() -> None:
    with raises(CostError, "context-too-long", 64, 65):
        measured(VirtualBench(), at=RequestShape(1, 60, 5))
    assert measured(VirtualBench(), at=RequestShape(1, 60, 4), replacements=(), names=[(0, "mlp")])
    with raises(UsageError, "precision-out-of-range", 0):
        measured(VirtualBench(), precision=0)


def test_many_groups_of_a_kind_are_one_by_their_weights() -> None:
    sizes = GraphSizes(
        {(n, "mlp"): SublayerSize(n + 1, 0, n + 1, 0, signature=str(n)) for n in range(6)}, 99, 99
    )
    (group,) = groups_of(sizes, [(0, "mlp")])
    assert [member.share for member in group.members] == pytest.approx(
        [(n + 1) / 3.5 for n in range(6)], rel=1e-12
    )
    few = GraphSizes({k: v for k, v in sizes.sublayers.items() if k[0] < 4}, 99, 99)
    assert len(groups_of(few, list(few.sublayers))) == 4
    shared = GraphSizes(
        {(n, "mlp"): SublayerSize(0, 0, 0, 0, signature=str(n)) for n in range(6)}, 99, 99
    )
    assert {m.share for m in groups_of(shared, [(0, "mlp")])[0].members} == {1.0}


def test_what_cannot_be_replaced_is_not_tried_so() -> None:
    sizes = GraphSizes(
        {(n, "mlp"): SublayerSize(9, 9, 9, 9, takes_linear=False, signature="s") for n in range(2)},
        99, 99, hidden=8,
    )  # fmt: skip
    (group,) = groups_of(sizes, [(0, "mlp")])
    replaced = [t.replacement for t in variants(group, sizes, ("bias", "linear"))]
    assert replaced == ["none", "bias"]
    unknown = GraphSizes(sizes.sublayers, 99, 99)
    assert [t.replacement for t in variants(group, unknown, ("bias", "linear"))] == ["none"]


@pytest.mark.parametrize("seed", range(2))
def test_two_rounds_on_a_busy_machine_are_not_certain(seed: int) -> None:
    table = measured(VirtualBench(BusyMachine(seed)), replacements=())
    for group in table.groups:
        for trial in group.trials:
            # Even a request of which every round fell into the middle of four times.
            assert trial.std_error_ms > 1e-4 * table.baseline_ms
