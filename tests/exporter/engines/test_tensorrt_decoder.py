"""What a decoder on engines tells the device, on graphs whose caches grow or lie in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from host_device import HostSession, decoder_of, engines_of

from exporter.engines.build.profiles import Ranges, Span
from exporter.engines.decoding.cache_plan import plan_cache
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.errors import BackendError
from graph_passes import save_model
from graph_passes.fusing.cache_in_place import CacheInPlacePass
from tests.graph_passes.decoder_graphs import decoder_model
from tests.raising import raises

ROOM = 32
RANGES = Ranges(batch=Span(1, 2, 3), prompt=Span(1, 4, 16), context=Span(1, 4, ROOM - 1))
PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]])
STEPS = np.array([[9, 2, 6], [8, 1, 8], [3, 3, 9]])


def written(folder: Path, *, in_place: bool) -> Path:
    model = decoder_model()
    if in_place:
        CacheInPlacePass(ROOM)(model)
    save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def steps(decoder: TensorRtDecoder | OnnxRuntimeDecoder, rows: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    found = [decoder.prefill(PROMPTS[:rows], context=ROOM)]
    return found + [decoder.step(token[:, None]) for token in STEPS[:, :rows]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_it_continues_as_on_onnx_runtime(
    in_place: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OnnxRuntimeDecoder(written(tmp_path / "plain", in_place=False), threads=1) as other:
        wanted = steps(other, rows)
    onnx = written(tmp_path, in_place=in_place)
    with decoder_of(onnx, RANGES, monkeypatch) as (decoder, _):
        first, again = steps(decoder, rows), steps(decoder, rows)
    np.testing.assert_allclose(first, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(again, wanted, rtol=0, atol=1e-5)  # what was left over is dead


def test_prompts_in_groups_fill_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = written(tmp_path, in_place=True)
    with decoder_of(onnx, RANGES, monkeypatch) as (decoder, _):
        wanted = steps(decoder, 3)
        monkeypatch.setattr(type(decoder.plan), "groups", lambda self, batch: GROUPS)
        found = steps(decoder, 3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


GROUPS = [slice(0, 1), slice(1, 3)]


def test_in_place_there_is_one_buffer_and_nothing_but_tokens_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {}
    for in_place in (False, True):
        onnx = written(tmp_path / str(in_place), in_place=in_place)
        with decoder_of(onnx, RANGES, monkeypatch) as (decoder, session):
            sent[in_place] = _after_a_step(decoder, session)
    (grown, grown_told), (placed, placed_told) = sent[False], sent[True]
    assert placed == grown == 2 * 3 * 8  # token and position of each
    assert grown_told == 3
    assert placed_told == 1  # a step is like the one before


def _after_a_step(decoder: TensorRtDecoder, session: HostSession) -> tuple[int, int]:
    decoder.prefill(PROMPTS)
    decode = next(each for each in session.profiles if each.slot.profile.phase == "decode")
    decode.told = 0
    for token in STEPS:
        before = session.cuda.sent
        decoder.step(token[:, None])
    caches = decoder.plan.total_bytes // sum(decoder.plan.cache_bytes.values())
    assert caches == (1 if decoder.plan.room else 2)
    assert session.fixed_shapes == (["decode"] if decoder.plan.room else [])
    return session.cuda.sent - before, decode.told


def test_a_text_longer_than_the_caches_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = written(tmp_path, in_place=True)
    plan = plan_cache(engines_of(onnx, RANGES))
    assert (plan.room, plan.longest, str(plan.context)) == (ROOM, ROOM, "1:31:31")
    plan.refuse_unfit(1, 16, 17)
    with raises(BackendError, "out-of-range", "--context", 32):
        plan.refuse_unfit(1, 16, 18)
    with decoder_of(onnx, RANGES, monkeypatch) as (decoder, _):
        decoder.prefill(PROMPTS[:1])
        for _ in range(ROOM - 5):
            decoder.step(np.array([[1]]))
        with raises(BackendError, "out-of-range", "--context", 32):
            decoder.step(np.array([[1]]))


def test_caches_of_several_lengths_are_no_decoder(tmp_path: Path) -> None:
    engines = engines_of(written(tmp_path, in_place=True), RANGES)
    record = engines.records[0]
    for each in record.inputs:
        if each.name == "attention_mask":
            object.__setattr__(each, "shape", (-1, 16))
    with raises(BackendError, "cache-lengths-differ"):
        plan_cache(engines)
