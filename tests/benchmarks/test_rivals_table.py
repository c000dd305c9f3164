from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.frame import KeptRows, read_table, rendered, wanted
from tests.benchmarks.rivals.methods import METHODS, NUMBERS, PUBLISHED, Row, rows
from tests.benchmarks.rivals.table import render

SLEB, OURS = Row("blocks", 4, "SLEB"), Row("blocks", 4, "ours")
JITTER = np.array([-0.01, 0.01, -0.02, 0.02])


def _finished(nll_sums: Any, kl: float = 0.5, clusters: tuple[int, ...] = (0, 1, 2, 3)) -> Any:
    """A row of 4 samples with 10 positions each."""
    sums = {
        "positions": [10.0] * 4,
        "nll_sums": np.asarray(nll_sums).tolist(),
        "baseline_nll_sums": [20.0] * 4,
        "kl_sums": (10 * (kl + JITTER)).tolist(),
        "clusters": clusters,
    }
    return {
        "made_s": 3.0, "read": [2, 40], "domains": {"test": sums, "docs": sums},
        "speed": {"ratio": 1.25, "ci95": [1.2, 1.3]},
    }  # fmt: skip


def _page(kept: dict[Row, Any], *others: Row) -> str:
    names = {row.name: finished for row, finished in kept.items()}
    setting = {"calibration": "calibration.txt", "command": "make rivals", "setting": "- tiny"}
    return render([*kept, *others], names, 30, **setting)


def _cells(page: str, method: str) -> list[str]:
    return next(row for row in read_table(page, 10) if row[0] == method)


def test_a_page_has_the_finished_rows_and_marks_the_best() -> None:
    left = Row("blocks", 7, "ours")
    kept = {SLEB: _finished(10 * (3.0 + JITTER), 0.5), OURS: _finished(10 * (2.5 + JITTER), 0.25)}
    page = _page(kept, left)
    worse, best = _cells(page, "SLEB"), _cells(page, "ours")
    assert [row[1] for row in (worse, best)] == ["2 + 40"] * 2
    assert [row[2] for row in (worse, best)] == [f"{np.exp(3.0):.2f}", f"{np.exp(2.5):.2f}"]
    assert worse[3].startswith("1.000 [")
    assert best[3].startswith("**0.500 [")
    assert (worse[4], best[4]) == ("0.500", "**0.250**")
    assert best[-2:] == ["1.25 [1.20, 1.30]", "3 s"]
    assert [row[1] for row in read_table(page, 6) if row[0] == "SLEB"] == ["2402.09025"]
    assert "## 4 blocks of 30" in page
    assert "## 7 blocks of 30" not in page
    assert left.name in page


@pytest.mark.parametrize(("better", "noise", "is_bold"), [(0.02, 0.0, False), (0.02, 0.5, True)])
def test_bold_is_what_only_chance_tells_from_the_best_on_the_same_samples(
    better: float, noise: float, is_bold: bool
) -> None:
    """All samples vary far more than the two methods differ."""
    spread, shift = np.array([-8.0, 8.0, -3.0, 3.0]), np.array([1.0, -1.0, 1.0, -1.0])
    other = 30 + spread + 10 * (better + noise * shift)
    page = _page({SLEB: _finished(30 + spread), OURS: _finished(other)})
    assert _cells(page, "SLEB")[3].startswith("**")
    assert _cells(page, "ours")[3].startswith("**") == is_bold
    (result,) = [line for line in page.splitlines() if line.startswith("Columns in which no row")]
    assert ("excess" in result) != is_bold


def test_samples_of_one_document_count_as_one() -> None:
    widths = []
    for clusters in ((0, 1, 2, 3), (0, 0, 1, 2)):
        page = _page({OURS: _finished([31.0, 31.0, 29.0, 29.0], clusters=clusters)})
        low, high = _cells(page, "ours")[3].strip("*").split("[")[1].strip("]").split(", ")
        widths.append(float(high) - float(low))
    assert widths[1] > 1.2 * widths[0]


def test_every_method_has_rows_of_every_number_of_its_unit() -> None:
    made = {(row.unit, row.method, row.dropped) for row in rows(1000)}
    for unit, method in METHODS:
        if method != "ours, folded":
            assert {n for u, m, n in made if (u, m) == (unit, method)} == set(NUMBERS[unit])
    assert len({row.name for row in rows(1000)}) == len(list(rows(1000)))
    rivals = {method for _, method in METHODS if not method.startswith("ours")}
    assert {name for name, *_ in PUBLISHED} == rivals


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


def test_a_table_is_read_as_it_was_written() -> None:
    table = [["a", "", "", "x \\| y"], ["", "b", "**c**", ""]]
    page = f"# Head\n\n{rendered(['1', '2', '3', '4'], table)}\n{rendered(['1'], [['other']])}"
    assert read_table(page, 4) == table
