"""The page of fusers has every try, and what depthcut takes is right on each architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forms.table import FUSERS, INTRODUCTION, SUBJECTS, Subject, read_lines

PAGE = (Path(__file__).parents[2] / "exporter" / "docs" / "fusers.md").read_text()
LINES = [line for lines in read_lines(PAGE).values() for line in lines]
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in LINES]


def test_every_try_is_there() -> None:
    assert PAGE.startswith(INTRODUCTION)
    tried = [
        (subject.name, fuser)
        for subject in SUBJECTS
        for fuser in FUSERS
        if subject.kind == "decoder" or fuser != "genai builder"
    ]
    assert [(row[0], row[1]) for row in ROWS] == tried


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_our_own_form_is_right_or_refused(subject: Subject) -> None:
    row = next(row for row in ROWS if row[:2] == [subject.name, "depthcut"])
    _, _, fused, in_place, error, note = row
    if subject.refused:
        assert subject.refused in note
        return
    assert note == ""
    assert float(error) <= 1e-4
    assert (in_place == "yes") == (subject.kind == "decoder")
    assert "Attention" in fused
