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
from exporter.choose.costs import measuring
from exporter.choose.costs.cost_runners import CostRunner
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize
from exporter.choose.costs.measuring import CostSettings, measure_on
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import (
    CostGroup,
    CostTable,
    Member,
    Trial,
    Variant,
    groups_of,
    variants,
)
from exporter.choose.costs.timing import Effort
from exporter.compare.timing.subjects import Probe
from exporter.errors import CostError, SurgeryError, UsageError
from exporter.progress import QUIET
from graph_passes.types import Replacement
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
        ("batch=0", "number-out-of-range"),
        ("prompt=0", "number-out-of-range"),
        ("new=-1", "number-out-of-range"),
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
    assert len(steps) <= 3


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


def grouped(*trials: Trial) -> CostTable:
    group = CostGroup(signature="s", members=mlps(8), trials=list(trials))
    return TABLE.model_copy(update={"groups": [group]})


def mlps(count: int) -> list[Member]:
    return [Member(layer=layer, kind="mlp") for layer in range(count)]


def trial(count: int, saved_ms: float, replacement: Replacement = "none") -> Trial:
    return Trial(
        replacement=replacement, treated=mlps(count), saved_ms=saved_ms, std_error_ms=0.1
    )  # fmt: skip


def test_savings_add_up() -> None:
    assert TABLE.saved_ms((0, "attention")) == 6.0
    assert TABLE.saved_ms((0, "mlp"), "linear") == -1.0
    choices = {(0, "attention"): "linear", (0, "mlp"): "none"}
    assert TABLE.speedup(choices) == pytest.approx(100 / 86, rel=1e-12)
    assert TABLE.speedup({}) == 1.0


def test_members_of_a_group_cost_the_same_by_their_share() -> None:
    table = grouped(trial(4, 8.0))
    assert [table.saved_ms((layer, "mlp")) for layer in range(8)] == [2.0] * 8
    assert table.groups[0].each_ms("none") == pytest.approx((2.0, 0.1 / 4), rel=1e-12)
    small, large = (Member(layer=n, kind="mlp", share=n + 0.5) for n in range(2))
    one = trial(1, 3.0).model_copy(update={"treated": [large]})
    group = CostGroup(signature="s", members=[small, large], trials=[one])
    uneven = TABLE.model_copy(update={"groups": [group]})
    saved = [uneven.saved_ms((layer, "mlp")) for layer in range(2)]
    assert saved == pytest.approx([1.0, 3.0], rel=1e-12)


def test_the_largest_trial_of_a_replacement_tells_what_it_saves() -> None:
    table = grouped(trial(4, 10.0), trial(2, 6.0), trial(4, 8.0, "linear"))
    choices = {(0, "mlp"): "linear", (1, "mlp"): "none"}
    assert table.speedup(choices) == pytest.approx(100 / (100 - 2.0 - 2.5), rel=1e-12)


def test_costs_that_save_everything_or_lack_a_sublayer_foretell_nothing() -> None:
    table = made_table({(0, "mlp"): {"none": 100.0}})
    assert table.speedup({(0, "mlp"): "none"}) is None
    assert table.speedup({(1, "mlp"): "none"}) is None


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


@dataclass
class CostlyArm(VirtualArm):
    """A model whose calls take what its sublayers take."""

    variant: Variant | None = None

    def probe(self, cell: Shape) -> Probe:
        phase = cell.phases[0]
        self.call_ms = FIXED_MS[phase] + sum(LAYERS * item[phase] for item in EACH_MS.values())
        for member in self.variant.members if self.variant else ():
            self.call_ms -= EACH_MS[member.kind][phase] - REPLACED_MS[self.variant.replacement]
        return super().probe(cell)


SIZES = GraphSizes(
    {
        (layer, kind): SublayerSize(size, size, 4 * size, 4 * size, signature=kind)
        for layer in range(LAYERS)
        for kind, size in (("attention", 40), ("mlp", 90))
    },
    10_000, 40_000, rest_caches=(CacheSize(1),), hidden=8, longest=64,
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
    sizes: GraphSizes = SIZES
    time: VirtualTime = field(default_factory=VirtualTime)
    timed: list[Variant] = field(default_factory=list)
    refused: str = ""
    dies_at: int | None = None

    @contextmanager
    def arms(self, variants: Mapping[str, Variant]) -> Iterator[Mapping[str, CostlyArm]]:
        ((name, variant),) = variants.items()
        if variant.members[0].kind == self.refused:
            raise SurgeryError("no")
        self.timed.append(variant)
        if self.dies_at == len(self.timed):
            raise KeyboardInterrupt
        yield {
            "baseline": CostlyArm(self.time, 0, self.noise),
            name: CostlyArm(self.time, 0, self.noise, variant=variant),
        }

    def effort(self, **changes: Any) -> Effort:
        return Effort(**{"seconds": 60.0, "clock": self.time, "seed": 0, **changes})


def measured(cost_runner: VirtualBench, **changes: Any) -> CostTable:
    """In two rounds each: enough where nothing disturbs, and for all but the numbers."""
    options = {"at": AT, "threads": 1, "effort": cost_runner.effort(rounds=2), **changes}
    names, progress = options.pop("names", None), options.pop("progress", QUIET)
    return measure_on(cast("CostRunner", cost_runner), CostSettings(**options), names, progress)


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
    table = measured(VirtualBench(BusyMachine(seed)), replacements=())
    # Two rounds are not certain, even if each fell into the middle of four times.
    errors = [trial.std_error_ms for group in table.groups for trial in group.trials]
    assert min(errors) > 1e-4 * table.baseline_ms


@pytest.mark.parametrize(("seconds", "messages"), [(0.5, 3), (60.0, 1)])
def test_a_figure_of_too_little_time_is_said_to_be_rough(seconds: float, messages: int) -> None:
    bench, progress = VirtualBench(), Mock(wraps=QUIET)
    effort = bench.effort(seconds=seconds)
    measured(bench, names=[(0, "mlp")], replacements=(), effort=effort, progress=progress)
    assert progress.say.call_count == messages


def test_each_group_is_cut_by_half_once_with_each_replacement() -> None:
    cost_runner = VirtualBench()
    measured(cost_runner)
    result = [
        (t.members[0].kind, t.replacement, [m.layer for m in t.members]) for t in cost_runner.timed
    ]
    assert result == [
        (kind, replacement, [1, 3, 5, 7])
        for kind in EACH_MS
        for replacement in ("none", "bias", "linear")
    ]


def test_only_the_groups_of_named_sublayers_are_measured() -> None:
    cost_runner = VirtualBench()
    table = measured(cost_runner, names=[(3, "mlp")], replacements=())
    assert {t.members[0].kind for t in cost_runner.timed} == {"mlp"}
    assert table.names == [(layer, "mlp") for layer in range(LAYERS)]
    with raises(CostError, "not-measured", "attention 0"):
        table.saved_ms((0, "attention"))


@pytest.mark.parametrize(
    ("bench", "options", "code", "field"),
    [
        ({}, {"names": [(99, "mlp")]}, "sublayer-missing", "mlp 99"),
        ({}, {"names": []}, "nothing-measured", ""),
        ({}, {"at": RequestShape(1, 60, 5)}, "context-too-long", 65),
        ({"refused": "mlp"}, {"names": [(0, "mlp")]}, "nothing-measured", ""),
    ],
)
def test_what_cannot_be_measured_is_refused(
    bench: Any, options: Any, code: str, field: object
) -> None:
    with raises(CostError, code, field):
        measured(VirtualBench(**bench), **options)
    assert measured(VirtualBench(), at=RequestShape(1, 60, 4), replacements=(), names=[(0, "mlp")])


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    kept = tmp_path / "costs.json"
    with pytest.raises(KeyboardInterrupt):
        measured(VirtualBench(dies_at=2), kept=kept, replacements=())
    first, second, more = VirtualBench(), VirtualBench(), VirtualBench()
    table = measured(first, kept=kept, replacements=("none",))
    assert len(first.timed) == 2 - 1
    again = measured(second, kept=kept, replacements=("none",), may_replace=False)
    assert again.groups == table.groups
    assert second.timed == []
    measured(more, kept=kept, replacements=("none", "bias"))
    assert [t.replacement for t in more.timed] == ["bias", "bias"]
    # Nor is anything lost that isn't asked for.
    measured(more, kept=kept, replacements=("linear",), names=[(0, "mlp")])
    table = CostTable.read(kept)
    for kind, how in (("attention", "bias"), ("mlp", "bias"), ("mlp", "linear")):
        assert table.saved_ms((0, kind), how) == pytest.approx(saved_ms(kind, how), rel=1e-4)


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
    assert len(cost_runner.timed) == 2
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
    with raises(CostError, "not-measured", "mlp 0", "none"):
        table.saved_ms((0, "mlp"))


def test_many_groups_of_a_kind_are_one_by_their_weights() -> None:
    def grouped_as(sizes: list[int]) -> list[CostGroup]:
        sublayers: Any = {
            (n, "mlp"): SublayerSize(size, 0, size, 0, signature=str(n))
            for n, size in enumerate(sizes)
        }
        return groups_of(GraphSizes(sublayers, 99, 99), [*sublayers])

    (group,) = grouped_as([1, 2, 3, 4, 5, 6])
    shares = [(n + 1) / 3.5 for n in range(6)]
    assert [member.share for member in group.members] == pytest.approx(shares, rel=1e-12)
    assert len(grouped_as([1, 2, 3, 4])) == 4
    (shared,) = grouped_as([0] * 6)
    assert {member.share for member in shared.members} == {1.0}


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
