from __future__ import annotations

import numpy as np
import pytest
from engine_support import CACHE, decoder_record

from exporter.engines.build.engine_set import choose_profile
from exporter.engines.runners.tensorrt import checked_input
from exporter.engines.tensors import TensorSpec, numpy_dtype, out_of_memory, plan_buffers
from exporter.errors import BackendError

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
    ("shapes", "message"),
    [
        (call(1, 7, 0), r"input_ids is 1x7, and prefill takes 1x1 to 2x6, decode takes 1x1 to 2x1"),
        (call(3, 1, 4), r"input_ids is 3x1"),
        (call(1, 1, 9), r"attention_mask is 1x10, and .*decode takes 1x2 to 2x9"),
        (call(1, 2, 4), r"input_ids is 1x2, and .*decode takes 1x1 to 2x1"),
    ],
)
def test_what_no_profile_holds_is_told_in_words(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        choose_profile("m", PROFILES, shapes)


def test_one_buffer_serves_every_profile() -> None:
    plan = plan_buffers([{"a": 100, "b": 0}, {"a": 300, "c": 256}])
    assert plan == {"a": 512, "b": 256, "c": 256}


def test_too_little_memory_says_what_was_asked_and_what_was_free() -> None:
    error = out_of_memory("present.3.key", 2_500_000_000, 1_200_000, 80_000_000_000)
    assert error.message == (
        "present.3.key takes 2.50 GB of device memory; 1.20 MB of 80.00 GB are free."
    )


def test_types_have_numpy_s_names() -> None:
    names = ("float", "half", "bf16", "int64", "bool")
    told = [str(numpy_dtype(name)) for name in names]
    assert told == ["float32", "float16", "bfloat16", "int64", "bool"]
    for unknown in ("fp8", "int4", "string"):
        with pytest.raises(BackendError, match=unknown):
            numpy_dtype(unknown)


def test_an_input_takes_the_engine_s_type() -> None:
    spec = TensorSpec("x", np.dtype(np.float16), (None, 4))
    assert checked_input("m", spec, np.zeros((2, 4), np.float32)).dtype == np.float16
    with pytest.raises(BackendError, match=r"x is 2x5, and the engine takes \?x4"):
        checked_input("m", spec, np.zeros((2, 5)))
    with pytest.raises(BackendError, match="x is 4, and"):
        checked_input("m", spec, np.zeros(4))
