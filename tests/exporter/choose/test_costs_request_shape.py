"""Requests: how they are written, and which runs of a graph stand for them."""

from __future__ import annotations

import pytest

from exporter.choose.costs.request_shape import RequestShape
from exporter.errors import CostError, UsageError
from tests.raising import raises


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
        ("past=512", "unknown-part"),
        ("prompt=1,prompt=2", "named-twice"),
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
