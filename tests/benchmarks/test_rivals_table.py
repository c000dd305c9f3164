from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.frame import KeptRows, wanted
from tests.benchmarks.rivals.methods import METHODS, NUMBERS, PUBLISHED, Row, rows
from tests.benchmarks.rivals.table import Setting, render

SETTING = Setting("calibration.txt", "make rivals", ["model: tiny"])


def _finished(row: Row, excess: float, right: list[float]) -> dict[str, Any]:
    """A row of 4 samples with 10 positions each, and 4 items."""
    jitter = np.array([-0.01, 0.01, -0.02, 0.02])
    sums = {
        "positions": [10.0] * 4,
        "nll_sums": (10 * (2.0 + excess + jitter)).tolist(),
        "baseline_nll_sums": [20.0] * 4,
        "kl_sums": (10 * (excess / 2 + jitter)).tolist(),
        "agreements": [5.0] * 4,
        "clusters": [0, 1, 2, 3],
    }
    return {
        "name": row.name,
        "made_s": 3.0,
        "read": [2, 40],
        "domains": {"test": sums, "docs": sums},
        "speed": {"ratio": 1.25, "ci95": [1.2, 1.3]},
        "answers": {"quiz": {"right": right, "log_p": [-excess, -excess / 2, -1.0, -2.0]}},
    }


def _lines(page: str, method: str) -> list[list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    return [line for line in cells if line and line[0] == method]


def test_a_page_has_the_finished_rows_and_marks_the_best() -> None:
    table = [Row("blocks", 4, "SLEB"), Row("blocks", 4, "ours"), Row("blocks", 7, "ours")]
    result = {
        table[0].name: _finished(table[0], 1.0, [0.0, 0.0, 1.0, 1.0]),
        table[1].name: _finished(table[1], 0.5, [1.0, 1.0, 1.0, 1.0]),
    }
    answers = {"quiz": {"right": [1.0, 1.0, 1.0, 0.0], "log_p": [0.0, 0.0, -1.0, -2.0]}}
    whole = {"answers": answers, "layers": 30}
    page = render(table, result, whole, SETTING)
    worse, worse_tasks, published = _lines(page, "SLEB")
    best, best_tasks = _lines(page, "ours")
    assert published[1] == "2402.09025"
    assert [line[1] for line in (worse, best)] == ["2 + 40"] * 2
    assert [line[2] for line in (worse, best)] == [f"{np.exp(3.0):.2f}", f"{np.exp(2.5):.2f}"]
    assert worse[3].startswith("1.000 [")
    assert best[3].startswith("**0.500 [")
    assert (worse[4], best[4]) == ("0.500", "**0.250**")
    assert best[-2:] == ["1.25 [1.20, 1.30]", "3 s"]
    assert best_tasks[2] == "**100.0 %**"
    assert worse_tasks[1].startswith("-0.375 [") or worse_tasks[1].startswith("**-0.375 [")
    assert "## 4 blocks of 30" in page
    assert "## 7 blocks of 30" not in page
    assert table[2].name in page


def _bold(page: str, method: str) -> list[bool]:
    return [cell.startswith("**") for line in _lines(page, method) for cell in line]


@pytest.mark.parametrize(("better", "noise", "is_bold"), [(0.02, 0.0, False), (0.02, 0.5, True)])
def test_bold_is_what_only_chance_tells_from_the_best_on_the_same_samples(
    better: float, noise: float, is_bold: bool
) -> None:
    """All samples vary far more than the two methods differ."""
    table = [Row("blocks", 4, "SLEB"), Row("blocks", 4, "ours")]
    first, second = (_finished(row, 1.0, [1.0, 0.0, 1.0, 0.0]) for row in table)
    spread, shift = np.array([-8.0, 8.0, -3.0, 3.0]), np.array([1.0, -1.0, 1.0, -1.0])
    sums = {**first["domains"]["test"], "nll_sums": (30 + spread).tolist()}
    other = {**sums, "nll_sums": (30 + spread + 10 * (better + noise * shift)).tolist()}
    first["domains"], second["domains"] = ({"test": item, "docs": item} for item in (sums, other))
    outcome = dict(zip([row.name for row in table], (first, second), strict=True))
    page = render(table, outcome, {"answers": {}, "layers": 30}, SETTING)
    assert _bold(page, "SLEB")[3]
    assert _bold(page, "ours")[3] == is_bold
    (result,) = [line for line in page.splitlines() if line.startswith("Columns in which no row")]
    assert ("excess" in result) != is_bold


def test_samples_of_one_document_count_as_one() -> None:
    row = Row("blocks", 4, "ours")
    widths = []
    for clusters in ([0, 1, 2, 3], [0, 0, 1, 2]):
        kept = _finished(row, 1.0, [1.0])
        sums = kept["domains"]["test"]
        sums |= {"nll_sums": [31.0, 31.0, 29.0, 29.0], "clusters": clusters}
        page = render([row], {row.name: kept}, {"answers": {}, "layers": 30}, SETTING)
        low, high = _lines(page, "ours")[0][3].strip("*").split("[")[1].strip("]").split(", ")
        widths.append(float(high) - float(low))
    assert widths[1] > 1.2 * widths[0]


def test_items_are_paired_too() -> None:
    table = [Row("blocks", 4, "SLEB"), Row("blocks", 4, "ours")]
    best, alike, worse = [1.0] * 30 + [0.0] * 10, [0.0] + [1.0] * 28 + [0.0] * 11, [0.0] * 40
    answers = {"quiz": {"right": best, "log_p": best}}
    for right, is_bold in ((alike, True), (worse, False)):
        result = {}
        for row, item in zip(table, (best, right), strict=True):
            result[row.name] = _finished(row, 1.0, item)
            result[row.name]["answers"]["quiz"]["log_p"] = item
        page = render(table, result, {"answers": answers, "layers": 30}, SETTING)
        assert _bold(page, "ours")[-2:] == [is_bold] * 2


def test_a_page_without_tasks_has_none() -> None:
    row = Row("attentions", 8, "NBL")
    kept = _finished(row, 1.0, [1.0]) | {"answers": {}}
    page = render([row], {row.name: kept}, {"answers": {}, "layers": 30}, SETTING)
    assert len(_lines(page, "NBL")[0]) == 10
    assert "quiz" not in page


def test_every_method_has_rows_of_every_number_of_its_unit() -> None:
    made = {(row.unit, row.method, row.dropped) for row in rows(1000)}
    for unit, method in METHODS:
        if method != "ours, folded":
            assert {n for u, m, n in made if (u, m) == (unit, method)} == set(NUMBERS[unit])
    assert len({row.name for row in rows(1000)}) == len(list(rows(1000)))
    rivals = {method for _, method in METHODS if not method.startswith("ours")}
    assert {item.method for item in PUBLISHED} == rivals


def test_rows_that_train_are_kept_by_how_much() -> None:
    few, many = ({row.name for row in rows(tokens)} for tokens in (1000, 2000))
    assert all("distilled" in name for name in few ^ many)
    assert len(few - many) == 4


def test_rows_are_found_by_what_they_hang_on(tmp_path: Path) -> None:
    kept = KeptRows(tmp_path / "new", ["model", "text"])
    assert kept.find("a row") is None
    kept.keep("a row", {"figure": 1.5})
    assert KeptRows(tmp_path / "new", ["model", "text"]).find("a row") == {"figure": 1.5}
    assert kept.find("another row") is None
    assert KeptRows(tmp_path / "new", ["model", "another text"]).find("a row") is None


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ((), {"4 blocks, ours", "4 blocks, ours, maps", "4 blocks, SLEB"}),
        (("ours",), {"4 blocks, ours", "4 blocks, ours, maps"}),
        (("4 blocks, ours", "SLEB"), {"4 blocks, ours", "4 blocks, SLEB"}),
        (("nothing",), set()),
    ],
)
def test_rows_are_wanted_by_name_or_by_part(only: tuple[str, ...], expected: set[str]) -> None:
    assert wanted(["4 blocks, ours", "4 blocks, ours, maps", "4 blocks, SLEB"], only) == expected
