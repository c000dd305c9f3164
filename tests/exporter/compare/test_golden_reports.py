"""Reports and costs that stay what they are, on a clock that only runs move."""

from __future__ import annotations

import re

import pytest

from tests.golden.reports import CASES, FOLDER, WITH_TORCH, golden_report

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.mark.usefixtures("exports_once")
@pytest.mark.torch
@pytest.mark.parametrize("name", WITH_TORCH)
def test_a_report_of_three_graphs_is_as_it_was(name: str) -> None:
    hold(name)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITH_TORCH])
def test_a_report_is_as_it_was(name: str) -> None:
    hold(name)


def hold(name: str) -> None:
    """Words are the same; numbers may differ by what processors differ by."""
    right, made = (FOLDER / f"{name}.txt").read_text(encoding="utf-8"), golden_report(name)
    assert NUMBER.sub("#", made).splitlines() == NUMBER.sub("#", right).splitlines()
    numbers = [list(map(float, NUMBER.findall(text))) for text in (made, right)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
