"""What a decoder on engines tells the device, on graphs whose caches grow or lie in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.engines.build.engine_set import EngineSet, find_engines
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder, plan_cache
from exporter.errors import BackendError
from tests.raising import raises
from tests.stand_in.decoders import ROOM, decoder_engine, decoder_onnx
from tests.stand_in.installed import stand_in

PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]])
STEPS = np.array([[9, 2, 6], [8, 1, 8], [3, 3, 9]])


def engines_of(folder: Path, *, in_place: bool) -> EngineSet:
    return find_engines(decoder_engine(folder, in_place=in_place))


def steps(decoder: TensorRtDecoder | OnnxRuntimeDecoder, rows: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    result = [decoder.prefill(PROMPTS[:rows], context=ROOM)]
    return result + [decoder.step(token[:, None]) for token in STEPS[:, :rows]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_it_continues_as_on_onnx_runtime(
    backend: str, in_place: bool, rows: int, tmp_path: Path
) -> None:
    plain = decoder_onnx(tmp_path / "plain", in_place=False)
    with OnnxRuntimeDecoder(plain, threads=1) as other:
        wanted = steps(other, rows)
    engine = decoder_engine(tmp_path, in_place=in_place, backend=backend)
    with stand_in() as machine:
        with TensorRtDecoder(find_engines(engine)) as decoder:
            first, again = steps(decoder, rows), steps(decoder, rows)
        assert machine.left_over == {}
    np.testing.assert_allclose(first, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(again, wanted, rtol=0, atol=1e-5)  # what was left over is dead


def test_prompts_in_groups_fill_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(), TensorRtDecoder(engines_of(tmp_path, in_place=True)) as decoder:
        wanted = steps(decoder, 3)
        monkeypatch.setattr(type(decoder.plan), "groups", lambda self, batch: GROUPS)
        result = steps(decoder, 3)
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)


GROUPS = [slice(0, 1), slice(1, 3)]


def test_a_text_longer_than_the_caches_is_refused(tmp_path: Path) -> None:
    engines = engines_of(tmp_path, in_place=True)
    plan = plan_cache(engines)
    assert (plan.room, plan.longest, str(plan.context)) == (ROOM, ROOM, "1:31:31")
    plan.refuse_unfit(1, 16, 17)
    with raises(BackendError, "out-of-range", "--context", 32):
        plan.refuse_unfit(1, 16, 18)
    with stand_in(), TensorRtDecoder(engines) as decoder:
        decoder.prefill(PROMPTS[:1])
        for _ in range(ROOM - 5):
            decoder.step(np.array([[1]]))
        with raises(BackendError, "out-of-range", "--context", 32):
            decoder.step(np.array([[1]]))


def test_caches_of_several_lengths_are_no_decoder(tmp_path: Path) -> None:
    engines = engines_of(tmp_path, in_place=True)
    record = engines.records[0]
    for item in record.inputs:
        if item.name == "attention_mask":
            object.__setattr__(item, "shape", (-1, 16))
    with raises(BackendError, "cache-lengths-differ"):
        plan_cache(engines)


SHORT, TOKEN = np.array([[3, 1, 4], [2, 7, 1]]), np.array([[5], [6]])


def test_it_goes_on_behind_what_the_caches_hold(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    with stand_in(), TensorRtDecoder(find_engines(engine), trial=False) as decoder:
        decoder.prefill(SHORT)
        wanted = decoder.step(TOKEN)
        decoder.begin_at(2, SHORT.shape[1])
        np.testing.assert_array_equal(decoder.step(TOKEN), wanted)
        decoder.begin_at(2, SHORT.shape[1] + 1)
        assert not np.array_equal(decoder.step(TOKEN), wanted)


def test_only_one_that_begins_texts_needs_a_prefill(tmp_path: Path) -> None:
    engines = find_engines(decoder_engine(tmp_path, phases=("decode",)))
    with raises(BackendError, "phase-missing", "prefill"):
        TensorRtDecoder(engines)
    with stand_in(), TensorRtDecoder(engines, trial=False, begins=False) as decoder:
        decoder.begin_at(2, ROOM - 1)
        decoder.advance(TOKEN)
        with raises(BackendError, "out-of-range", "--context", ROOM):
            decoder.advance(TOKEN)


def test_a_smaller_batch_takes_less_memory_and_holds_no_more(tmp_path: Path) -> None:
    engines = find_engines(decoder_engine(tmp_path, phases=("decode",)))
    taken = []
    for batch in (1, 3):
        with (
            stand_in() as machine,
            TensorRtDecoder(engines, trial=False, batch=batch, begins=False) as decoder,
        ):
            taken.append(machine.most_used)
            with raises(BackendError, "out-of-range", batch + 1):
                decoder.begin_at(batch + 1, 1)
    assert taken[0] < taken[1]


def test_too_little_memory_has_a_code_of_its_own(tmp_path: Path) -> None:
    engines = find_engines(decoder_engine(tmp_path, phases=("decode",)))
    with stand_in(memory_bytes=1 << 17), raises(BackendError, "out-of-memory"):
        TensorRtDecoder(engines, trial=False, begins=False).__enter__()
