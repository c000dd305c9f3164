"""A decoder on engines, as far as it can be reckoned without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_text_model import tokenizer

from exporter.cli import run
from exporter.engines.build.engine_set import EngineSet, EngineTensor
from exporter.engines.build.profiles import Span
from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.open_decoder import open_decoder
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.decoding.tensorrt_decoder import (
    CachePlan,
    DeviceCache,
    TensorRtDecoder,
    plan_cache,
)
from exporter.errors import BackendError, UsageError
from graph_passes import save_model
from tests.engine_support import CACHE, decoder_record, written_as
from tests.raising import ends_in, raises
from tests.tiny_graphs import TinySpec, tiny_model

PHASES = ("prefill", "decode")


def engines(**changes: Any) -> EngineSet:
    record = decoder_record(changes.pop("phases", PHASES), **changes)
    return EngineSet((Path("m.engine"),), (record,))


def plan(**changes: Any) -> CachePlan:
    return plan_cache(engines(**changes))


def test_the_plan_follows_from_the_record() -> None:
    result = plan()
    assert (result.prefill.number, result.decode.number) == (0, 1)
    assert result.pairs == dict(zip(CACHE, ("present.0.key", "present.0.value"), strict=True))
    assert (str(result.batch), str(result.prompt), str(result.context)) == (
        "1:1:2",
        "1:4:6",
        "1:4:8",
    )
    # 2 sequences, 2 heads, 8 + 1 positions, 4 numbers of 2 bytes, rounded up to 256
    assert result.cache_bytes == dict.fromkeys(CACHE, 512)
    assert result.total_bytes == 2 * 2 * 512
    assert result.shapes(2, 1, 5) == {
        "input_ids": (2, 1), "attention_mask": (2, 6), **dict.fromkeys(CACHE, (2, 2, 5, 4)),
    }  # fmt: skip


def test_every_shape_of_a_generation_lies_in_its_profile() -> None:
    result = plan()
    result.refuse_unfit(2, 6, 4)
    assert not result.prefill.profile.outside(result.shapes(2, 6, 0))
    assert not any(result.decode.profile.outside(result.shapes(2, 1, past)) for past in (6, 7, 8))
    assert result.decode.profile.outside(result.shapes(2, 1, 9))


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ((3, 4, 1), ("--batch-range", 3, 1, 2)),
        ((1, 7, 1), ("--prompt-range", 7, 1, 6)),
        ((1, 4, 7), ("--context-range", 9, 1, 8)),
        ((1, 0, 1), ("--prompt-range", 0)),
    ],
)
def test_what_the_profiles_do_not_hold_is_refused(
    asked: tuple[int, int, int], fields: tuple[object, ...]
) -> None:
    with raises(BackendError, "out-of-range", *fields):
        plan().refuse_unfit(*asked)
    plan().refuse_unfit(1, 4, 6)  # the last of them is not run


def grouped(prefill: int, decode: int) -> CachePlan:
    """Engines whose phases take different batches at most."""
    result = plan()
    return replace(result, prefill_batch=Span(1, prefill, prefill), batch=Span(1, decode, decode))


def test_prompts_run_in_groups_that_fit() -> None:
    rows = [(group.start, group.stop) for group in grouped(2, 5).groups(5)]
    assert rows == [(0, 1), (1, 3), (3, 5)]
    assert len(grouped(5, 5).groups(5)) == 1


def test_a_group_begins_where_its_sequences_do() -> None:
    result = grouped(2, 5)
    # 3 sequences of 2 heads, 4 positions, 4 numbers of 2 bytes
    assert result.offsets(3, 4) == dict.fromkeys(CACHE, 3 * 64)
    banks = DeviceCache(result.pairs, dict.fromkeys(CACHE, 0), dict.fromkeys(CACHE, 1000))
    bound = banks.bindings(result.offsets(3, 4))
    assert (bound[CACHE[0]], bound["present.0.key"]) == (0, 1192)


def test_a_group_must_begin_where_the_library_takes_it() -> None:
    grouped(1, 5).refuse_unfit(1, 3, 1)  # alone, it begins at the buffer's own address
    with raises(BackendError, "groups-unaligned", 3):
        grouped(1, 5).refuse_unfit(2, 3, 1)
    with raises(BackendError, "out-of-range", "batch", 2):
        replace(grouped(3, 5), prefill_batch=Span(3, 3, 3)).refuse_unfit(2, 4, 1)


def test_what_a_step_writes_is_the_next_one_s_past() -> None:
    pairs = {"past.k": "present.k", "past.v": "present.v"}
    banks = DeviceCache(pairs, {"past.k": 1, "past.v": 2}, {"past.k": 3, "past.v": 4})
    for _ in range(3):
        before = banks.bindings()
        assert len(set(before.values())) == 4  # nothing is read where it is written
        banks.swap()
        after = banks.bindings()
        assert {past: after[past] for past in pairs} == {
            past: before[present] for past, present in pairs.items()
        }


def without_cache(record_inputs: list[EngineTensor]) -> list[EngineTensor]:
    return [tensor for tensor in record_inputs if tensor.name not in CACHE]


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"phases": ("prefill",)}, "phase-missing", "for decode"),
        ({"phases": ("decode",)}, "phase-missing", "for prefill"),
        ({"inputs": without_cache(decoder_record(()).inputs)}, "no-kv-cache", "m.engine"),
        ({"outputs": decoder_record(()).outputs[:-1]}, "cache-not-continued", "past_key_values"),
        ({"outputs": decoder_record(()).outputs[1:]}, "no-kv-cache", "m.engine"),
        (
            {
                "inputs": [
                    *decoder_record(()).inputs,
                    EngineTensor(name="odd", dtype="int64", shape=(1,)),
                ]
            },
            "unknown-input",
            "'odd'",
        ),
    ],
)
def test_engines_that_cannot_generate_are_told(
    change: dict[str, Any], code: str, field: str
) -> None:
    with raises(BackendError, code, field):
        plan(**change)


def test_a_decoder_refuses_before_it_is_loaded(tmp_path: Path) -> None:
    path = written_as(tmp_path / "m.engine", phases=PHASES)
    decoder = open_decoder(path)
    assert isinstance(decoder, TensorRtDecoder)
    with raises(BackendError, "out-of-range", "--context", 12):
        generate(decoder, [1, 2, 3, 4], new_tokens=10)
    with raises(BackendError, "not-entered"):
        decoder.prefill(np.array([[1, 2]]))


def test_a_folder_is_what_lies_in_it(tmp_path: Path) -> None:
    written_as(tmp_path / "m-prefill.engine", phases=("prefill",))
    written_as(tmp_path / "m-decode.engine", phases=("decode",))
    assert isinstance(open_decoder(tmp_path), TensorRtDecoder)
    save_model(tiny_model(TinySpec()), tmp_path / "model.onnx")
    assert isinstance(open_decoder(tmp_path), OnnxRuntimeDecoder)
    assert isinstance(open_decoder(tmp_path, backend="engine"), TensorRtDecoder)
    with raises(UsageError, "wrong-backend", "model.onnx"):
        open_decoder(tmp_path / "model.onnx", backend="engine")
    with raises(UsageError, "wrong-backend", "m-decode.engine"):
        open_decoder(tmp_path / "m-decode.engine", backend="onnxruntime")


def test_generate_on_onnx_keeps_to_the_model_s_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny_model(TinySpec()), tmp_path / "model.onnx")
    file = tokenizer(tmp_path / "beside")
    (file.parent / "config.json").write_text(json.dumps({"max_position_embeddings": 6}))
    arguments = ["generate", str(tmp_path), "cc", "--tokenizer", str(file), "--threads", "1"]
    with ends_in(BackendError, "context-too-long", 6, 7, "(2 + 5)"):
        assert run([*arguments, "-n", "5"]) == 2
    assert run([*arguments, "-n", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")
