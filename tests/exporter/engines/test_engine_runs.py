"""Which calls reach a card when engines run, on the stand-in: phases, modes, memory, copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.build.engine_set import EngineRecord, find_engines, sidecar_path
from exporter.engines.build.libraries import Device, Driver
from exporter.engines.build.session import Session, cache_path
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import decoder_on, open_decoder
from exporter.engines.decoding.tensorrt_decoder import TensorRtDecoder, plan_cache
from exporter.engines.runners.base import BoundCall
from exporter.engines.runners.tensorrt import TensorRtRunner, open_engine
from exporter.engines.tensors import make_inputs, random_tokens
from exporter.errors import BackendError, DepthcutError, EngineError
from exporter.files import sha256_file
from tests.raising import raises
from tests.stand_in import trt
from tests.stand_in.decoders import ROOM, decoder_engine, decoder_onnx
from tests.stand_in.installed import stand_in
from tests.stand_in.machine import Machine
from tests.stand_in.trt import Run

STEP = Shape("decode", 2, 1, 8)
PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]])
PROMPT = PROMPTS[:2]
BACKENDS = pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
PLACES = pytest.mark.parametrize("in_place", [True, False])


def prepared(runner: Any, shape: Shape) -> BoundCall:
    inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 11))
    call: BoundCall = runner.prepare(inputs, phase=shape.phase)
    return call


def stepped(decoder: Any, steps: int = 3) -> None:
    """A prompt and some steps."""
    token = decoder.prefill(PROMPT).argmax(-1)[:, None]
    for _ in range(steps):
        token = decoder.step(token).argmax(-1)[:, None]


def mode(run: Run) -> tuple[int, bool, bool]:
    return run.profile, run.as_graph, run.generic


@BACKENDS
def test_a_decode_step_runs_the_decode_profile(backend: str, tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, backend=backend)
    with stand_in() as machine, open_engine(engine) as runner:
        prepared(runner, STEP)()
        assert machine.runs[-1].profile == 1
        inputs = make_inputs(runner.inputs, STEP, random_tokens(STEP, 11))
        runner.run(inputs)  # the phase isn't told: the tightest one that holds it
        assert machine.runs[-1].profile == 1
        runner.run(inputs, phase="prefill")
        assert machine.runs[-1].profile == 0


@BACKENDS
@PLACES
def test_what_is_timed_is_what_generate_runs(backend: str, in_place: bool, tmp_path: Path) -> None:
    """The trial takes that path too."""
    engine = decoder_engine(tmp_path, backend=backend, in_place=in_place)
    with stand_in() as machine:
        with open_engine(engine) as runner:
            trial = [mode(run) for run in machine.runs]
            call = prepared(runner, STEP)
            call()
            call()
        timed = mode(machine.runs[-1])
        with TensorRtDecoder(find_engines(engine)) as decoder:
            stepped(decoder)
            assert mode(machine.runs[-1]) == timed
    assert timed[1] == in_place
    assert not in_place or (1, True, False) in trial


def test_kernels_are_compiled_once_for_an_engine_a_card_and_a_driver(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)

    def compiled(machine: Machine) -> int:
        before = machine.calls["compiled"]
        with TensorRtDecoder(find_engines(engine)) as decoder:
            stepped(decoder)
        return machine.calls["compiled"] - before

    with stand_in() as machine:
        assert compiled(machine) > 0
        assert compiled(machine) == 0


@PLACES
def test_greedy_agreement_leaves_the_cache_on_the_device(in_place: bool, tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, in_place=in_place)
    with stand_in() as machine, open_engine(engine) as runner, decoder_on(runner) as decoder:
        stepped(decoder, 1)
        before = dict(machine.calls)
        decoder.step(np.array([[1], [2]]))
        moved = {
            way: machine.calls[f"bytes {way}"] - before[f"bytes {way}"] for way in ("up", "down")
        }
        assert moved == {"up": 2 * 2 * 8, "down": 2 * 11 * 4}  # ids and positions; logits


def test_the_gap_before_the_launch_is_not_in_the_time(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, backend="tensorrt", weights_bytes=1 << 20)
    times = {}
    for launch_us in (1.0, 30.0):
        with stand_in(launch_us=launch_us), open_engine(engine) as runner:
            call = prepared(runner, STEP)
            assert call.timed is not None
            times[launch_us] = [call.timed() for _ in range(3)][-1]
    assert times[30.0] == pytest.approx(times[1.0])


def test_memory_is_the_engine_s_own_and_that_of_the_buffers(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, weights_bytes=1 << 20)
    with stand_in() as machine:
        runner = TensorRtRunner(find_engines(engine))
        machine.take(1 << 16, "others")
        real = machine.take

        def others_too(size: int, what: str) -> bool:
            return real(1000, "others") and real(size, what)

        machine.take = others_too  # type: ignore[method-assign]
        with runner:
            own = sum(size for what, size in machine.used.items() if what != "others")
            assert runner.capabilities.gpu_memory_bytes == own


def test_a_capture_that_fails_falls_back_and_says_so(tmp_path: Path) -> None:
    said = {}
    for able in (True, False):
        engine = decoder_engine(tmp_path / str(able), backend="tensorrt", capturable=able)
        with stand_in() as machine, open_engine(engine) as runner:
            call = prepared(runner, STEP)
            call()
            said[able] = call.launches()
            assert machine.runs[-1].as_graph == able
    assert said[True] == "CUDA graph"
    assert said[False].startswith("kernels, ")


def test_a_graph_is_given_back_when_another_takes_its_place(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, backend="tensorrt")
    with stand_in() as machine, open_engine(engine) as runner:
        for past in (4, 5, 6):
            prepared(runner, Shape("decode", 1, 1, past))()
            prepared(runner, Shape("decode", 2, 1, past))()
        assert machine.left_over["Graph"] == 1


@BACKENDS
def test_memory_that_runs_out_says_what_helps(backend: str, tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path, backend=backend, weights_bytes=1 << 20)
    for memory_bytes in (1 << 18, (1 << 20) + (1 << 12), (1 << 20) + (1 << 14)):  # at loading
        with stand_in(memory_bytes=memory_bytes) as machine:
            runner = TensorRtRunner(find_engines(engine), trial=False)
            with raises(DepthcutError, "out-of-memory", "batch"):
                runner.__enter__()
            assert machine.left_over == {}
    with stand_in() as machine:  # in a run
        with open_engine(engine) as runner:
            machine.fails["execute_async_v3"] = 2
            with raises(BackendError, "out-of-memory", "batch"):
                prepared(runner, STEP)
        assert machine.left_over == {}


def test_a_file_that_is_no_engine_is_no_lack_of_memory(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    engine.write_bytes(b"no engine")
    path = sidecar_path(engine)
    changes = {"engine_bytes": 9, "engine_sha256": sha256_file(engine)}
    EngineRecord.read(path).model_copy(update=changes).write(path)
    with stand_in(), raises(EngineError, "not-loaded", engine):
        open_engine(engine, trial=False).__enter__()


@pytest.mark.parametrize("validity", ["VALID", "SUBOPTIMAL", "INVALID"])
def test_what_the_library_says_of_an_engine_is_told(validity: str, tmp_path: Path) -> None:
    runner = open_engine(decoder_engine(tmp_path), trial=False)
    with stand_in(validity=validity):
        if validity == "INVALID":
            with raises(EngineError, "invalid-engine", "UNSUPPORTED_CC"):
                runner.__enter__()
            return
        with runner:
            notes = runner.capabilities.notes
    assert ["UNSUPPORTED_CC" in note for note in notes] == [True] * (validity == "SUBOPTIMAL")


@pytest.mark.parametrize(
    ("shape", "far"),
    [
        (Shape("decode", 2, 1, 5), ()),
        (Shape("decode", 1, 1, 5), ()),
        (Shape("prefill", 2, 4), ()),
        (Shape("prefill", 2, 16), ("prefill", "input_ids", "2x16", "2x4")),
        (Shape("prefill", 1, 2), ("prefill", "input_ids", "1x2", "2x4")),
    ],
)
def test_a_timed_shape_far_from_the_one_that_kernels_are_tuned_for_is_told(
    shape: Shape, far: tuple[str, ...], tmp_path: Path
) -> None:
    with stand_in(), open_engine(decoder_engine(tmp_path), trial=False) as runner:
        for _ in range(2):
            prepared(runner, shape)
    notes = runner.capabilities.notes
    assert len(notes) == bool(far)
    assert all(word in notes[0] for word in far)


@pytest.mark.parametrize("content", [b"broken", b'{"place": ["1.6", "card", 12], "known": []}'])
def test_a_broken_runtime_cache_is_written_anew(content: bytes, tmp_path: Path) -> None:
    engines = find_engines(decoder_engine(tmp_path))
    with stand_in() as machine:
        compiled = []
        for broken in (False, True, False):
            with Session(engines) as session:
                (cache,) = session._caches.values()
                if broken:
                    assert not cache.path.exists()
            compiled.append(machine.calls["compiled"])
            kept = cache.path.read_bytes()
            assert kept != content
            if len(compiled) == 1:
                cache.path.write_bytes(content)
    assert compiled[0] < compiled[1] == compiled[2]


def test_a_runtime_cache_that_gives_nothing_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = find_engines(decoder_engine(tmp_path))
    for gives_nothing in (True, False):
        with stand_in() as machine, monkeypatch.context() as patch:
            if gives_nothing:
                patch.setattr(trt.IRuntimeCache, "serialize", lambda _: None)
            with Session(engines) as session:
                (cache,) = session._caches.values()
            assert machine.left_over == {}
            assert cache.path.exists() != gives_nothing


def test_another_driver_or_card_has_another_runtime_cache(tmp_path: Path) -> None:
    (record,) = find_engines(decoder_engine(tmp_path)).records
    cards = [Device("A", "sm89", 1), Device("B", "sm89", 1)]
    drivers = [Driver("", version, (card,)) for version in ("13.0", "13.1") for card in cards]
    assert len({cache_path(record, driver) for driver in drivers}) == 4


STEPS = np.array([[9, 2, 6], [8, 1, 8], [3, 3, 9]])


def steps(decoder: Decoder, rows: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    result = [decoder.prefill(PROMPTS[:rows], context=ROOM)]
    return result + [decoder.step(token[:, None]) for token in STEPS[:, :rows]]


@pytest.mark.parametrize("rows", [1, 3])
@PLACES
@BACKENDS
def test_it_continues_as_on_onnx_runtime(
    backend: str, in_place: bool, rows: int, tmp_path: Path
) -> None:
    with open_decoder(decoder_onnx(tmp_path / "plain", in_place=False), threads=1) as other:
        wanted = steps(other, rows)
    engine = decoder_engine(tmp_path, in_place=in_place, backend=backend)
    with stand_in() as machine:
        with TensorRtDecoder(find_engines(engine)) as decoder:
            for _ in range(2):  # what was left over is dead
                np.testing.assert_allclose(steps(decoder, rows), wanted, rtol=0, atol=1e-5)
        assert machine.left_over == {}


def test_prompts_in_groups_fill_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(), TensorRtDecoder(find_engines(decoder_engine(tmp_path))) as decoder:
        wanted, groups = steps(decoder, 3), [slice(0, 1), slice(1, 3)]
        monkeypatch.setattr(type(decoder.plan), "groups", lambda self, batch: groups)
        np.testing.assert_allclose(steps(decoder, 3), wanted, rtol=0, atol=1e-5)


def test_a_text_longer_than_the_caches_is_refused(tmp_path: Path) -> None:
    engines = find_engines(decoder_engine(tmp_path))
    plan = plan_cache(engines)
    assert (plan.room, plan.longest, str(plan.context)) == (ROOM, ROOM, "1:31:31")
    plan.refuse_unfit(1, 16, 17)
    with raises(BackendError, "no-profile-fits", "--context", 32):
        plan.refuse_unfit(1, 16, 18)
    with stand_in(), TensorRtDecoder(engines) as decoder:
        decoder.prefill(PROMPT[:1])
        for _ in range(ROOM - 5):
            decoder.step(np.array([[1]]))
        with raises(BackendError, "no-profile-fits", "--context", 32):
            decoder.step(np.array([[1]]))
    for item in engines.records[0].inputs:
        if item.name == "attention_mask":
            object.__setattr__(item, "shape", (-1, 16))
    with raises(BackendError, "unknown-input"):
        plan_cache(engines)


TOKEN = np.array([[5], [6]])


def test_it_goes_on_behind_what_the_caches_hold(tmp_path: Path) -> None:
    engine = decoder_engine(tmp_path)
    with stand_in(), TensorRtDecoder(find_engines(engine), trial=False) as decoder:
        decoder.prefill(PROMPT)
        wanted = decoder.step(TOKEN)
        decoder.begin_at(2, 5)
        np.testing.assert_array_equal(decoder.step(TOKEN), wanted)
        decoder.begin_at(2, 6)
        assert not np.array_equal(decoder.step(TOKEN), wanted)


def test_only_one_that_begins_texts_needs_a_prefill(tmp_path: Path) -> None:
    engines = find_engines(decoder_engine(tmp_path, phases=("decode",)))
    with raises(BackendError, "no-profile-fits", "prefill"):
        TensorRtDecoder(engines)
    with stand_in(), TensorRtDecoder(engines, trial=False, begins=False) as decoder:
        decoder.begin_at(2, ROOM - 4)
        decoder.step(TOKEN)
        assert decoder.timed_steps(3) > 0
        assert decoder.launches == "CUDA graph"
        with raises(BackendError, "no-profile-fits", "--context", ROOM):
            decoder.timed_steps(1)
        with pytest.raises(BackendError):
            decoder.step(TOKEN[:1])


def test_a_smaller_batch_takes_less_memory_and_holds_no_more(tmp_path: Path) -> None:
    engines = find_engines(decoder_engine(tmp_path, phases=("decode",)))
    taken = []
    for batch in (1, 3):
        with (
            stand_in() as machine,
            TensorRtDecoder(engines, trial=False, batch=batch, begins=False) as decoder,
        ):
            taken.append(machine.most_used)
            with raises(BackendError, "no-profile-fits", batch + 1):
                decoder.begin_at(batch + 1, 1)
    assert taken[0] < taken[1]
