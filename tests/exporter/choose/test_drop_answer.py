"""Which cut is recommended, and what is measured for it; the measuring itself needs PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.artifacts import DepthCell, DepthDamage
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import CostGroup, CostTable, Member, Trial
from exporter.choose.depths import DepthOptions
from exporter.choose.depths_answer import recommended, speedups
from exporter.errors import OptionError
from exporter.models.ablation.branch_replacements import NOTHING
from graph_passes.types import SublayerRef
from tests.made_reports import gate_row, made_environment
from tests.made_tables import damage
from tests.raising import raises


def within(ratio: float, reach: float) -> DepthDamage:
    """Of a ratio that is known to so much, where it is one of several; alone to half of it."""
    ends = (ratio - reach / 2, ratio + reach / 2)
    result = {"perplexity_ratio_ci95": ends, "perplexity_ratio_most": ratio + reach}
    return damage(ratio, 0.1).model_copy(update=result)


def cell(
    number: int, bare: float, healed: float | None, speedup: float | None, reach: float = 0.001
) -> DepthCell:
    return DepthCell(
        way="attention",
        number=number,
        parameters_removed=0.01 * number,
        damage=within(bare, reach),
        healed=None if healed is None else within(healed, reach),
        speedups={} if speedup is None else {"request": speedup},
    )


@pytest.mark.parametrize(
    ("cells", "number"),
    [
        ([cell(2, 1.01, None, 1.05), cell(4, 1.015, None, 1.1)], 4),
        ([cell(2, 1.01, None, 1.05), cell(4, 1.03, None, 1.1)], 2),
        ([cell(2, 1.01, None, 1.05), cell(4, 1.03, 1.018, 1.1)], 4),
        ([cell(2, 1.01, None, 1.05), cell(4, 1.03, 1.0195, 1.1)], 2),  # its interval is too wide
        ([cell(2, 1.01, None, 1.05), cell(4, 1.015, None, 1.1, 0.006)], 2),
        ([cell(2, 1.01, 1.5, 1.05)], 2),  # healing did harm: the bare cut keeps it
        ([cell(2, 1.03, 1.021, 1.05)], None),
        ([cell(2, 1.0, None, 1.005)], None),  # not worth it
        ([cell(2, 1.01, None, 1.2), cell(4, 1.005, None, 1.2)], 4),
        ([cell(2, 1.01, None, None), cell(4, 1.01, None, None)], 4),  # no speed: the smaller model
        ([DepthCell(way="block", number=2, refused="The plan drops everything.")], None),
        ([], None),
    ],
)
def test_the_fastest_cut_within_the_limit_is_recommended(
    cells: list[DepthCell], number: int | None
) -> None:
    best = recommended(cells, 0.02)
    assert (best and best.number) == number


def test_a_single_sample_recommends_nothing() -> None:
    alone = cell(2, 1.0, None, 1.5)
    unsure = damage(1.0, 0.1).model_copy(update={"perplexity_ratio_most": None})
    assert recommended([alone.model_copy(update={"damage": unsure})], 0.02) is None
    assert recommended([alone], 0.02) == alone


def table(candidate_ms: float) -> CostTable:
    """Of a prompt of 100 ms and a step of 100 ms, with two of four attentions cut."""
    members = [Member(layer=layer, kind="attention") for layer in range(4)]
    rows = [gate_row(candidate_ms=candidate_ms), gate_row(candidate_ms=90.0)]
    trial = Trial(
        replacement="none",
        treated=members[:2],
        saved_ms=sum(row.baseline.median_ms - row.candidate.median_ms for row in rows),
        std_error_ms=1.0,
        rows=rows,
    )
    return CostTable(
        at=RequestShape(prompt=8, new=1),
        backend="pytorch",
        provider="CPU",
        environment=made_environment(),
        baseline_ms=200.0,
        groups=[CostGroup(signature="attention", members=members, trials=[trial])],
    )


def test_speeds_are_told_for_the_prompt_for_a_token_and_for_both() -> None:
    cut = {SublayerRef(3, "attention"): NOTHING}
    values = speedups(table(80.0), cut)
    assert values == {
        "prefill": pytest.approx(100 / 90, rel=1e-3),
        "decode": pytest.approx(100 / 95, rel=1e-3),
        "request": pytest.approx(200 / 185, rel=1e-3),
    }
    # Twice the time that two took is all of it: such costs are wrong.
    assert speedups(table(40.0), {SublayerRef(n, "attention"): NOTHING for n in range(4)}) == {}


def test_a_few_cuts_are_tried_where_no_numbers_are_asked_for() -> None:
    assert DepthOptions().asked(30) == [
        ("attention", 1), ("attention", 2), ("attention", 4), ("attention", 8), ("block", 2),
    ]  # fmt: skip
    assert DepthOptions().asked(3) == [
        ("attention", 1), ("attention", 2), ("block", 2),
    ]  # fmt: skip
    assert DepthOptions(ways=("mlp",)).asked(6) == [("mlp", 1), ("mlp", 2), ("mlp", 4)]
    study = DepthOptions(numbers=(4, 2), ways=("attention", "joint"))
    assert study.asked(3) == [("attention", 2), ("attention", 4), ("joint", 2), ("joint", 4)]


@pytest.mark.parametrize("given", [{"other_text": "mine.txt"}, {"most_increase": 0.05}])
def test_what_only_an_answer_uses_is_refused_without_one(given: dict[str, Any]) -> None:
    with raises(OptionError, "", "--recommend"):
        DepthOptions(numbers=(4,), **given)
    DepthOptions(**given)
    DepthOptions(numbers=(4,), recommend=True, **given)
