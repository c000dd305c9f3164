"""A decoder that only continues texts, for timing: an engine for decode alone, a smaller batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.engines.build.engine_set import find_engines
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder
from exporter.errors import BackendError
from tests.raising import raises
from tests.stand_in.decoders import ROOM, decoder_engine
from tests.stand_in.installed import stand_in

PROMPTS = np.array([[3, 1, 4], [2, 7, 1]])
TOKEN = np.array([[5], [6]])


def test_it_goes_on_behind_what_the_caches_hold(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    with stand_in(), TensorRtDecoder(find_engines(engine), trial=False) as decoder:
        decoder.prefill(PROMPTS)
        wanted = decoder.step(TOKEN)
        decoder.begin_at(2, PROMPTS.shape[1])
        np.testing.assert_array_equal(decoder.step(TOKEN), wanted)
        decoder.begin_at(2, PROMPTS.shape[1] + 1)
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
