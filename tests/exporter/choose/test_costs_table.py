"""What is foretold from measured costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.choose.costs.table import CostGroup, CostTable, Member, Trial
from exporter.errors import ArtifactError, CostError
from tests.made_tables import made_table
from tests.raising import raises

TABLE = made_table(
    {
        (0, "attention"): {"none": 6.0, "bias": 5.5, "linear": 4.0},
        (0, "mlp"): {"none": 10.0, "linear": -1.0},
    }
)


def members(count: int, **share: float) -> list[Member]:
    return [Member(layer=layer, kind="mlp", **share) for layer in range(count)]


def grouped(trials: list[Trial], count: int = 8) -> CostTable:
    group = CostGroup(signature="s", members=members(count), trials=trials)
    return TABLE.model_copy(update={"groups": [group]})


def trial(count: int, saved_ms: float, replacement: str = "none", error: float = 0.1) -> Trial:
    treated = members(count)
    return Trial(
        replacement=replacement, treated=treated, saved_ms=saved_ms, std_error_ms=error
    )  # fmt: skip


def test_savings_add_up() -> None:
    assert TABLE.saved_ms((0, "attention")) == 6.0
    assert TABLE.saved_ms((0, "mlp"), "linear") == -1.0
    choices = {(0, "attention"): "linear", (0, "mlp"): "none"}
    assert TABLE.total_saved_ms(choices) == pytest.approx(14.0, rel=1e-12)  # rounding of a sum
    assert TABLE.speedup(choices) == pytest.approx(100 / 86, rel=1e-12)
    assert TABLE.speedup({}) == 1.0


def test_members_of_a_group_cost_the_same_by_their_share() -> None:
    table = grouped([trial(4, 8.0)])
    assert [table.saved_ms((layer, "mlp")) for layer in range(8)] == [2.0] * 8
    assert table.groups[0].each_ms("none") == pytest.approx((2.0, 0.1 / 4), rel=1e-12)
    small, large = Member(layer=0, kind="mlp", share=0.5), Member(layer=1, kind="mlp", share=1.5)
    group = CostGroup(
        signature="s", members=[small, large],
        trials=[Trial(replacement="none", treated=[large], saved_ms=3.0, std_error_ms=0.3)],
    )  # fmt: skip
    uneven = TABLE.model_copy(update={"groups": [group]})
    assert uneven.saved_ms((0, "mlp")) == pytest.approx(1.0, rel=1e-12)
    assert uneven.saved_ms((1, "mlp")) == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize(("cut", "saved"), [(1, 3.0), (2, 6.0), (3, 8.0), (4, 10.0), (6, 15.0)])
def test_numbers_between_the_trials_are_interpolated(cut: int, saved: float) -> None:
    table = grouped([trial(4, 10.0), trial(2, 6.0)])
    choices = {(layer, "mlp"): "none" for layer in range(cut)}
    assert table.total_saved_ms(choices) == pytest.approx(saved, rel=1e-12)


def test_a_replacement_takes_off_what_it_costs_itself() -> None:
    table = grouped([trial(4, 10.0), trial(2, 6.0), trial(4, 8.0, "linear")])
    choices = {(0, "mlp"): "linear", (1, "mlp"): "none"}
    assert table.total_saved_ms(choices) == pytest.approx(6.0 - 0.5, rel=1e-12)
    only_linear = grouped([trial(4, 8.0, "linear")])
    assert only_linear.total_saved_ms({(0, "mlp"): "linear"}) == 2.0


def test_costs_that_save_everything_are_wrong() -> None:
    table = made_table({(0, "mlp"): {"none": 100.0}})
    with raises(CostError, "costs-too-high"):
        table.speedup({(0, "mlp"): "none"})


@pytest.mark.parametrize("rank", [None, 16])
def test_times_of_maps_of_a_rank_are_no_times_of_full_ones(
    tmp_path: Path, rank: int | None
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(json.loads(TABLE.model_dump_json()) | {"rank": rank}))
    if rank is None:
        assert CostTable.read(path).groups == TABLE.groups
    else:
        with raises(ArtifactError, "", path, "rank"):
            CostTable.read(path)
