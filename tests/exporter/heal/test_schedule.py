"""Which samples the steps of a training read."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest

from exporter.heal.options import HealOptions
from exporter.models.texts.calibration import CalibrationText

pytestmark = pytest.mark.torch


def _schedule(lengths: list[int], *, processes: int = 1, **told: Any) -> Any:
    from exporter.heal.distill.training import Schedule

    width = max(lengths)
    text = CalibrationText.unpadded(np.zeros((len(lengths), width), np.int64), "made", "0" * 64)
    mask = np.arange(width) < np.array(lengths)[:, None]
    options = HealOptions(kind="distill", **told)
    return Schedule(CalibrationText(text.ref, text.input_ids, mask), options, processes)


def test_samples_of_one_length_come_in_the_texts_order_first_then_in_others() -> None:
    made = _schedule([8] * 6, step_tokens=16, tokens=96)
    steps = [made.rows(step) for step in range(made.total_steps)]
    assert (made.step_tokens, made.total_steps) == (16, 6)
    assert steps[:3] == [[0, 1], [2, 3], [4, 5]]
    assert sorted(chain(*steps[3:])) == list(range(6))
    assert steps[3:] != steps[:3]
    assert not made.reads_steps_again
    assert [_schedule([8] * 6, step_tokens=16, tokens=96).rows(n) for n in range(6)] == steps


def test_paragraphs_are_read_beside_others_as_long_always_the_same() -> None:
    lengths = [2, 9, 3, 8, 1, 10, 4, 7]
    made = _schedule(lengths, step_tokens=11, tokens=88)
    assert (made.step_tokens, made.total_steps) == (11, 8)
    first, second = ([made.rows(start + step) for step in range(4)] for start in (0, 4))
    assert sorted(map(tuple, first)) == sorted(map(tuple, second))
    assert sorted(chain(*first)) == list(range(8))
    assert {tuple(sorted(lengths[row] for row in rows)) for rows in first} == {
        (1, 2), (3, 4), (7, 8), (9, 10),
    }  # fmt: skip
    assert made.reads_steps_again
    assert not _schedule(lengths, step_tokens=11, tokens=22).reads_steps_again


def test_processes_share_longer_steps() -> None:
    made = _schedule([8] * 6, step_tokens=16, tokens=96, processes=3)
    assert len(made.rows(0)) == 6
    assert (made.step_tokens, made.total_steps) == (48, 2)
