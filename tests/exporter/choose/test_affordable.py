"""How a number of sublayers is chosen where nobody says how."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from exporter.artifacts import ImportanceReport
from exporter.choose.selection.by_scores import (
    FEWEST_TOKENS,
    SEARCH_S,
    USUAL_DROPS,
    affordable_shortlist,
    affordable_tokens,
    by_scores_inside,
    search_runs,
)
from exporter.choose.selection.search_options import SearchOptions
from tests.made_reports import importance_of


def report(layers: int) -> ImportanceReport:
    return importance_of({kind: [0.1] * layers for kind in ("attention", "mlp")})


@pytest.mark.parametrize(
    ("counts", "protect"),
    [
        ({"attention": 2}, ("first", "last")),
        ({"attention": 4}, ("first", "last")),
        ({"attention": 5}, ("last",)),
        ({"attention": 6}, ()),
        ({"attention": 2, "mlp": 5}, ("last",)),
        ({"joint": 8}, ("first", "last")),
        ({"block": 4}, ("first", "last")),
    ],
)
def test_the_ends_stay_as_far_as_others_are_enough(
    counts: Mapping[str, int], protect: tuple[str, ...]
) -> None:
    search_options = by_scores_inside(SearchOptions(), report(6), counts, allow_all=False)
    assert (search_options.search, search_options.protect) == ("one-shot", protect)


def test_what_a_user_protects_stands_alone() -> None:
    search_options = SearchOptions(protect=("attention:2",))
    result = by_scores_inside(search_options, report(6), {"attention": 2}, allow_all=False)
    assert result.protect == ("attention:2",)


def test_a_search_gets_the_tokens_that_its_time_allows_or_none() -> None:
    many = affordable_tokens(10**8, runs=50, operations_per_s=1e12)
    assert many == 10 * affordable_tokens(10**8, runs=50, operations_per_s=1e11)
    assert many > FEWEST_TOKENS
    assert affordable_tokens(10**10, runs=50, operations_per_s=1e11) == 0


def test_a_search_that_takes_too_long_measures_fewer_candidates() -> None:
    def found(parameters: int, shortlist: int = 12) -> int:
        return affordable_shortlist(parameters, 60, 1e11, shortlist)

    assert found(10**7) == 12
    assert found(10**7, 5) == 5
    assert 1 < found(3 * 10**8) < 12
    assert (
        search_runs(60, USUAL_DROPS, found(3 * 10**8)) * 2 * 3e8 * FEWEST_TOKENS < SEARCH_S * 1e11
    )
    assert found(10**10) == 1
    assert affordable_shortlist(10**6, 60, 1e11, 0) == 60
