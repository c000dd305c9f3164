"""The page of fusers has every try, and what depthcut takes is right on each architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forms.__main__ import PAGE, SUBJECTS, Subject, fusers_of

TEXT = (Path(__file__).parents[2] / "exporter" / "docs" / "fusers.md").read_text()
ROWS = PAGE.read(TEXT)


def test_every_try_is_there() -> None:
    assert TEXT.startswith(PAGE.introduction.partition("{")[0])
    tried = {name: [cells[1] for cells in rows] for name, rows in ROWS.items()}
    assert [*tried.items()] == [(subject.name, fusers_of(subject)) for subject in SUBJECTS]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_our_own_form_is_right_or_refused(subject: Subject) -> None:
    *_, (_, _, fused, in_place, error, note) = ROWS[subject.name]
    if subject.refused:
        assert subject.refused in note
        return
    assert note == ""
    assert float(error) <= 1e-4
    assert (in_place == "yes") == (subject.kind == "decoder")
    assert "Attention" in fused
