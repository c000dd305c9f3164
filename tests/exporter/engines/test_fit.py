from __future__ import annotations

import numpy as np
import pytest

from exporter.engines.build.engine_set import AttentionRecord, choose_profile
from exporter.engines.runners.cache_form import padded_before
from exporter.engines.runners.tensorrt import checked_input, refuse_untold
from exporter.engines.tensors import TensorSpec, numpy_dtype, out_of_memory, plan_buffers
from exporter.errors import BackendError
from tests.engine_support import CACHE, decoder_record, record
from tests.raising import raises

PROFILES = decoder_record(("prefill", "decode")).profiles


def call(batch: int, sequence: int, past: int) -> dict[str, tuple[int, ...]]:
    return {
        "input_ids": (batch, sequence),
        "attention_mask": (batch, past + sequence),
        **dict.fromkeys(CACHE, (batch, 2, past, 4)),
    }


@pytest.mark.parametrize(
    ("shapes", "number"),
    [(call(1, 6, 0), 0), (call(2, 1, 0), 0), (call(1, 1, 1), 1), (call(2, 1, 8), 1)],
)
def test_a_call_finds_the_profile_that_holds_it(
    shapes: dict[str, tuple[int, ...]], number: int
) -> None:
    assert choose_profile("m", PROFILES, shapes) == number


@pytest.mark.parametrize(
    ("shapes", "fields"),
    [
        (call(1, 7, 0), ("input_ids", "1x7", "prefill", "1x1 to 2x6", "decode", "1x1 to 2x1")),
        (call(3, 1, 4), ("input_ids", "3x1")),
        (call(1, 1, 9), ("attention_mask", "1x10", "decode", "1x2 to 2x9")),
        (call(1, 2, 4), ("input_ids", "1x2", "decode", "1x1 to 2x1")),
    ],
)
def test_what_no_profile_holds_is_told_in_words(
    shapes: dict[str, tuple[int, ...]], fields: tuple[str, ...]
) -> None:
    with raises(BackendError, "no-profile-fits", *fields):
        choose_profile("m", PROFILES, shapes)


def test_one_buffer_serves_every_profile() -> None:
    plan = plan_buffers([{"a": 100, "b": 0}, {"a": 300, "c": 256}])
    assert plan == {"a": 512, "b": 256, "c": 256}


def test_too_little_memory_says_what_was_asked_and_what_was_free() -> None:
    error = out_of_memory("present.3.key", 2_500_000_000, 1_200_000, 80_000_000_000)
    for name in ("present.3.key", "2.50 GB", "1.20 MB", "80.00 GB"):
        assert name in error.message


def test_types_have_numpy_s_names() -> None:
    names = ("float", "half", "bf16", "int64", "bool")
    result = [str(numpy_dtype(name)) for name in names]
    assert result == ["float32", "float16", "bfloat16", "int64", "bool"]
    for unknown in ("fp8", "int4", "string"):
        with raises(BackendError, "unknown-type", unknown):
            numpy_dtype(unknown)


def test_an_input_takes_the_engine_s_type() -> None:
    spec = TensorSpec("x", np.dtype(np.float16), (None, 4))
    assert checked_input("m", spec, np.zeros((2, 4), np.float32)).dtype == np.float16
    with raises(BackendError, "wrong-shape", "2x5", "?x4"):
        checked_input("m", spec, np.zeros((2, 5)))
    with raises(BackendError, "wrong-shape", 4):
        checked_input("m", spec, np.zeros(4))


ROOM = AttentionRecord(told_by="mask", reads="room")
FILLED = AttentionRecord(told_by="lengths", reads="filled")
NEW = AttentionRecord(told_by="order", reads="new")


@pytest.mark.parametrize(
    ("mask", "new", "refusing"),
    [
        ([1, 1, 1, 0], 3, {}),
        ([1, 1, 0, 0], 3, {}),
        ([1, 1, 1, 1], 3, {"new": "filled-caches"}),
        ([0, 1, 1, 0], 3, {"new": "no-padding", "filled": "no-padding"}),
        ([1, 0, 1, 0], 1, {"new": "no-padding", "filled": "no-padding"}),
    ],
)
def test_what_an_engine_would_misread_is_refused(
    mask: list[int], new: int, refusing: dict[str, str]
) -> None:
    inputs = {
        "input_ids": np.ones((2, new), np.int64),
        "attention_mask": np.array([[1] * new + [0] * (4 - new), mask]),
    }
    assert padded_before(inputs) == ("filled" in refusing)
    for attention in (None, ROOM, FILLED, NEW):
        code = refusing.get("" if attention is None else attention.reads)
        if code is None:
            refuse_untold(record(attention=attention), inputs)
        else:
            with raises(BackendError, code, "m.engine"):
                refuse_untold(record(attention=attention), inputs)


def test_nothing_is_padded_where_there_is_no_mask() -> None:
    assert not padded_before({"pixel_values": np.zeros((1, 3))})
