"""Caches in one buffer: what they give, prompts in chunks, and the last logits alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.decoding.decoder import runner_caches
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.decoding.runner_decoder import GrowingCache, RunnerDecoder, SharedCache
from exporter.engines.runners import onnxruntime as prefill_chunks
from exporter.engines.runners.base import Capabilities, Runner
from exporter.engines.runners.cache_form import read_cache_form, run_packed
from exporter.engines.runners.onnxruntime import CHUNK_TOKENS, OnnxRuntimeRunner, chunks, in_chunks
from exporter.engines.tensors import make_inputs, random_tokens
from exporter.errors import BackendError
from graph_passes import Deletion, prune_graph
from graph_passes.fusing.logits_to_keep import KEEP, LogitsToKeepPass
from graph_passes.fusing.prompt_alone import PromptAlonePass
from tests.engine_support import apart, bindings, in_steps
from tests.graph_passes.fused_graphs import VOCABULARY, FusedSpec, fused_model
from tests.raising import raises
from tests.stand_in.decoders import decoder_onnx
from tests.tiny_graphs import TinySpec, saved, tiny_model

PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]])
STEPS = np.array([[9, 2, 6], [8, 1, 8], [3, 3, 9]])
ROOM = PROMPTS.shape[1] + STEPS.shape[1]
PAST = "past_key_values.0.key"


def fused(folder: Path, *, layers: int = 3, int4: bool = False, cut: bool = False) -> Path:
    model = fused_model(FusedSpec(layers=layers, int4=int4))
    if cut:
        model, _ = prune_graph(model, [Deletion(1, "attention")])
    return saved(model, folder)


@contextmanager
def growing(path: Path) -> Iterator[RunnerDecoder]:
    """A decoder on the same graph whose cache grows."""
    with open_decoder(path, threads=1) as decoder:
        runner = decoder._runner
        decoder._cache = GrowingCache(runner, runner_caches(runner))
        yield decoder


def logits(decoder: RunnerDecoder, rows: int) -> list[np.ndarray[Any, Any]]:
    result = [decoder.prefill(PROMPTS[:rows], context=ROOM)]
    return result + [decoder.step(token[:, None]) for token in STEPS[:, :rows]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("int4", [False, True])
def test_the_logits_are_those_of_a_cache_that_grows(
    rows: int, cut: bool, int4: bool, tmp_path: Path
) -> None:
    path = fused(tmp_path, cut=cut, int4=int4)
    with growing(path) as decoder:
        wanted = logits(decoder, rows)
    with open_decoder(path, threads=1) as decoder:
        assert isinstance(decoder.cache, SharedCache)
        result = logits(decoder, rows)
        assert apart(result, wanted) <= 1e-4
        assert apart(logits(decoder, rows), wanted) <= 1e-4  # what is left over is dead


def test_nothing_is_copied_between_steps(tmp_path: Path) -> None:
    with open_decoder(fused(tmp_path), threads=1) as decoder:
        decoder.prefill(PROMPTS, context=ROOM)
        assert isinstance(decoder.cache, SharedCache)
        before = {name: value.data_ptr() for name, value in decoder.cache.buffers.items()}
        assert len(set(before.values())) == 6
        for number, token in enumerate(STEPS):
            decoder.step(token[:, None])
            content = decoder.cache.buffers[PAST].numpy()
            filled = PROMPTS.shape[1] + number + 1
            assert np.abs(content[:, :, :filled]).min(axis=(0, 1, 3)).min() > 0
            assert not content[:, :, filled:].any()
        after = {name: value.data_ptr() for name, value in decoder.cache.buffers.items()}
        assert after == before
        decoder.prefill(PROMPTS, context=ROOM)
        assert {n: value.data_ptr() for n, value in decoder.cache.buffers.items()} == before
        decoder.prefill(PROMPTS, context=ROOM + 1)
        assert decoder.cache.buffers[PAST].shape() == [3, 2, ROOM + 1, 16]
    with growing(tmp_path / "model.onnx") as decoder:
        decoder.prefill(PROMPTS)
        assert isinstance(decoder.cache, GrowingCache)
        decoder.step(STEPS[0][:, None])
        assert decoder.cache._values[PAST].shape() == [3, 2, PROMPTS.shape[1] + 1, 16]


def test_a_timed_call_writes_where_it_reads(tmp_path: Path) -> None:
    shape = Shape("decode", 2, 1, 4)
    with OnnxRuntimeRunner(fused(tmp_path), threads=1) as runner, bindings() as bound:
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 11))
        call = runner.prepare(inputs)
        buffer = bound[0].values[PAST]
        first, place = buffer.numpy().copy(), buffer.data_ptr()
        call()
        assert buffer.data_ptr() == place
        assert first.shape == (2, 2, 5, 16)
        assert (first[:, :, :4] == inputs[PAST]).all()
        assert first[:, :, 4].any()
        assert (buffer.numpy() == first).all()  # a second call does the same
        run = runner.run(inputs, ["present.0.key"])["present.0.key"]
    assert apart(first, run) <= 1e-6


def test_a_text_that_outgrows_the_buffer_is_refused(tmp_path: Path) -> None:
    path = fused(tmp_path)
    with open_decoder(path, threads=1) as decoder:
        decoder.prefill(PROMPTS, context=6)
        decoder.step(STEPS[0][:, None])
        with raises(BackendError, "cache-too-short", 7, 6):
            decoder.step(STEPS[0][:, None])
    with open_decoder(path, threads=1, context=8) as short:
        assert len(generate(short, [3, 1, 4], new_tokens=6).token_ids) == 6
        with raises(BackendError, "cache-too-short", 8, 3, 7, 9):
            generate(short, [3, 1, 4], new_tokens=7)


def with_shape(model: ir.Model, *dims: int | str) -> ir.Model:
    for value in model.graph.inputs:
        if "past" in (value.name or ""):
            value.shape = ir.Shape(dims)
    return model


def test_a_graph_may_fix_the_buffer(tmp_path: Path) -> None:
    path = saved(with_shape(fused_model(FusedSpec()), "batch", 2, 7, "size"), tmp_path)
    with growing(fused(tmp_path / "free", layers=2)) as free:
        wanted = generate(free, [3, 1, 4], new_tokens=5).token_ids
    with open_decoder(path, threads=1) as decoder:
        assert generate(decoder, [3, 1, 4], new_tokens=5).token_ids == wanted
        with raises(BackendError, "cache-too-short", 7):
            generate(decoder, [3, 1, 4], new_tokens=6)
    shape = Shape("decode", 1, 1, 7)
    with OnnxRuntimeRunner(path, threads=1) as runner:
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 11))
        with raises(BackendError, "cache-too-short", "key", 7, 8):
            runner.prepare(inputs)


def test_sizes_that_only_have_a_name_are_found(tmp_path: Path) -> None:
    path = saved(with_shape(fused_model(FusedSpec()), "batch", "heads", "past", "size"), tmp_path)
    with open_decoder(path, threads=1) as decoder:
        assert decoder._specs[PAST].shape == ("batch", 2, "past", 16)
        assert len(generate(decoder, [3, 1, 4], new_tokens=5).token_ids) == 5
    hidden = with_shape(fused_model(FusedSpec()), "batch", 2, "past", "size")
    for node in hidden.graph:
        if node.op_type == "GroupQueryAttention":
            assert node.inputs[0] is not None
            node.inputs[0].shape = None
    with (
        open_decoder(saved(hidden, tmp_path / "hidden"), threads=1) as decoder,
        raises(BackendError, "unknown-input", "past_key_values.0.key"),
    ):
        decoder.prefill(PROMPTS)


def test_a_past_that_others_read_grows_and_takes_no_padding(tmp_path: Path) -> None:
    model = fused_model(FusedSpec())
    past = next(value for value in model.graph.inputs if value.name == PAST)
    length = ir.node("Shape", [past], {"start": 2, "end": 3})
    length.outputs[0].name = "past_length"
    length.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    length.outputs[0].shape = ir.Shape([1])
    model.graph.append(length)
    model.graph.outputs.append(length.outputs[0])
    path = saved(model, tmp_path)
    assert PAST not in read_cache_form(path).shared
    texts = []
    for file, kind in ((path, GrowingCache), (fused(tmp_path / "alone", layers=2), SharedCache)):
        with open_decoder(file, threads=1) as decoder:
            assert isinstance(decoder.cache, kind)
            texts.append(generate(decoder, [3, 1, 4], new_tokens=5).token_ids)
    assert texts[0] == texts[1]
    with OnnxRuntimeRunner(path, threads=1) as runner:
        inputs = make_inputs(runner.inputs, Shape("prefill", 3, 8), TEXTS)
        runner.run(inputs)
        inputs["attention_mask"] = np.array(MASKS["left"], np.int32)
        with raises(BackendError, "no-padding"):
            runner.run(inputs)


def test_answers_are_judged_in_place_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OnnxRuntimeRunner(fused(tmp_path), threads=1) as runner:
        with RunnerDecoder(runner) as decoder:
            assert isinstance(decoder.cache, SharedCache)
            token_ids = generate(decoder, [3, 1, 4], new_tokens=5).token_ids
        with RunnerDecoder(runner) as other:  # the runner is still entered
            monkeypatch.setattr(OnnxRuntimeRunner, "value", Runner.value)
            monkeypatch.setattr(OnnxRuntimeRunner, "continued", Runner.continued)
            other._cache = GrowingCache(runner, runner_caches(runner))
            assert generate(other, [3, 1, 4], new_tokens=5).token_ids == token_ids
    plain = saved(tiny_model(TinySpec(layers=2)), tmp_path / "plain")
    with OnnxRuntimeRunner(plain, threads=1) as runner, RunnerDecoder(runner) as decoder:
        assert isinstance(decoder.cache, GrowingCache)


def look_at(model: ir.Model, window: int, *, kept: bool, first: int | None = None) -> ir.Model:
    """Has the first attentions look at a window; they may keep no more in buffers of their own."""
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in attentions[:first]:
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
        node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", int(kept))
    return model


@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_run_gives_a_window_s_cache_its_room(first: int, tmp_path: Path) -> None:
    """From no past on, which such an attention takes in no buffer shorter than the window."""
    texts, mask, steps = [], np.ones((1, 5), np.int64), [first, *[1] * (5 - first)]
    for number, (window, kept) in enumerate([(3, True), (3, False), (-1, False)]):
        model = look_at(fused_model(FusedSpec()), window, kept=kept, first=1)
        path = saved(model, tmp_path / str(number))
        with OnnxRuntimeRunner(path, threads=1) as runner:
            logits, caches = in_steps(runner, PROMPTS[:1], mask, steps)
        assert {cache.shape[2] for cache in caches.values()} == {5}
        texts.append(logits[:, first - 1 :])
    assert apart(texts[0], texts[1]) <= 1e-5
    assert apart(texts[0], texts[2]) > 1e-2


PROMPT = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
ROWS = np.repeat(PROMPT, 2, axis=0)
LEAST = 3


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_chunks, "CHUNK_TOKENS", LEAST)


def chunked(
    folder: Path, model: ir.Model | None = None, *, window: int = -1, kept: bool = False
) -> Path:
    """With a choice of logits, without which no prompt runs in chunks."""
    model = fused_model(FusedSpec()) if model is None else model
    assert LogitsToKeepPass()(model).modified
    return saved(look_at(model, window, kept=kept), folder)


def forms(folder: Path) -> Iterator[Path]:
    """Whole, in 4 bits, cut, and with attentions that look at a window of 4 positions."""
    cut, _ = prune_graph(fused_model(FusedSpec(layers=3)), [Deletion(1, "attention")])
    for number, model in enumerate([None, fused_model(FusedSpec(int4=True)), cut]):
        yield chunked(folder / str(number), model)
    yield chunked(folder / "window", window=4)


def generated(path: Path, ids: Any, *, whole: bool = False) -> tuple[list[int], Any, list[Any]]:
    """The prompt's runs in tokens, the logits after it and after two steps, and the caches."""
    lengths: list[int] = []
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        open_decoder(path, threads=1) as decoder,
    ):
        assert isinstance(decoder.cache, SharedCache)
        if whole:
            decoder._runner.capabilities = Capabilities()
        run = decoder.cache.run

        def watched(tokens: Any, total: int) -> Any:
            lengths.append(tokens["input_ids"].shape[1])
            return run(tokens, total)

        monkeypatch.setattr(decoder.cache, "run", watched)
        logits = [decoder.prefill(ids, context=ids.shape[1] + 2)]
        logits += [decoder.step(ids[:, n : n + 1]) for n in (0, 1)]
        caches = [value.numpy().copy() for value in decoder.cache.buffers.values()]
    return lengths[:-2], np.array(logits), caches


def test_a_generation_is_the_same(tmp_path: Path) -> None:
    for path in forms(tmp_path):
        lengths, logits, caches = generated(path, PROMPT)
        alone, wanted, wanted_caches = generated(path, PROMPT, whole=True)
        assert (lengths, alone) == ([3, 4, 4], [11])
        assert apart(logits, wanted) <= 1e-5
        for item, cache in zip(caches, wanted_caches, strict=True):
            assert apart(item, cache) <= 1e-5


def timed(path: Path, shape: Shape, ids: Any) -> list[Any]:
    """The bindings of a timed call, which was called once more."""
    with bindings() as bound, OnnxRuntimeRunner(path, threads=1) as runner:
        inputs = make_inputs(runner.inputs, shape, ids)
        runner.prepare(inputs)()
        whole = runner.run(inputs)
    assert whole["logits"].shape[1] == shape.sequence_length  # who judges asks for all
    keys = bound[-2].values[PAST].numpy()  # the last one is that of the run
    assert apart(keys, whole["present.0.key"]) <= 1e-5
    logits = bound[-2].binding.get_outputs()[0].numpy()
    assert apart(logits[:, -1], whole["logits"][:, -1]) <= 1e-5
    return bound[:-1]


@pytest.mark.parametrize("past", [0, 4])
def test_a_timed_call_does_the_same(past: int, tmp_path: Path) -> None:
    for path in forms(tmp_path):
        bound = timed(path, Shape("prefill", 1, 11, past), PROMPT)
        assert [item.values["input_ids"].shape()[1] for item in bound] == [3, 4, 4]
        assert len({item.values[PAST].data_ptr() for item in bound}) == 1


@pytest.mark.parametrize(
    ("shape", "ids"),
    [
        (Shape("prefill", 1, 5), PROMPT[:, :5]),  # hardly longer than a chunk
        (Shape("decode", 1, 1, 11), PROMPT[:, :1]),
        (Shape("prefill", 2, 11), ROWS),
    ],
    ids=str,
)
def test_what_has_no_two_chunks_or_several_rows_runs_whole(
    shape: Shape, ids: Any, tmp_path: Path
) -> None:
    assert len(timed(chunked(tmp_path), shape, ids)) == 1


def test_forms_whose_prompts_run_whole(tmp_path: Path) -> None:
    """A window that is kept alone, a choice of logits that isn't there, a cache that grows."""
    bare = saved(fused_model(FusedSpec()), tmp_path / "bare")
    plain = chunked(tmp_path / "plain", tiny_model(TinySpec(layers=2)))
    for path in (chunked(tmp_path / "kept", window=4, kept=True), bare, plain):
        with OnnxRuntimeRunner(path, threads=1) as runner:
            assert runner.capabilities.prefill_chunk_tokens == 0


def test_chunks_are_even_and_none_is_shorter_than_asked() -> None:
    for new in (1, CHUNK_TOKENS, 2 * CHUNK_TOKENS - 1, 2 * CHUNK_TOKENS, 2049):
        result = chunks(new, CHUNK_TOKENS)
        lengths = [span.stop - span.start for span in result]
        assert sum(lengths) == new
        assert len(result) == max(1, new // CHUNK_TOKENS)
        assert max(lengths) - min(lengths) <= 1
    assert chunks(2048, 0) == [slice(0, 2048)]


def test_a_padded_row_runs_whole() -> None:
    mask = np.ones((1, 11), np.int64)
    inputs = {"input_ids": PROMPT, "attention_mask": mask}
    assert [call["attention_mask"].shape[1] for call in in_chunks(inputs, 5)] == [5, 11]
    mask[0, -1] = 0
    assert len(in_chunks(inputs, 5)) == 1


@pytest.fixture(scope="module", params=[True, False], ids=["choice", "none"])
def choice(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    model = fused_model(FusedSpec())
    if request.param:
        assert LogitsToKeepPass()(model).modified
    return saved(model, tmp_path_factory.mktemp("model")), request.param


@pytest.mark.parametrize("past", [0, 4])
def test_a_timed_call_gives_the_last(choice: tuple[Path, bool], past: int) -> None:
    shape = Shape("decode", 2, 1 if past else 5, past)
    with bindings() as bound, OnnxRuntimeRunner(choice[0], threads=1) as runner:
        inputs = make_inputs(runner.inputs, shape, PROMPTS[:2, : shape.sequence_length])
        assert KEEP not in inputs
        runner.prepare(inputs)()
        logits = bound[0].binding.get_outputs()[0].numpy()
        wanted = runner.run(inputs, ["logits"])["logits"]
    assert wanted.shape[1] == shape.sequence_length
    assert logits.shape == (2, 1 if choice[1] else shape.sequence_length, VOCABULARY)
    assert np.abs(logits[:, -1] - wanted[:, -1]).max() <= 1e-5


def test_a_decoder_asks_for_the_last(
    choice: tuple[Path, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_decoder(choice[0], threads=1) as decoder:
        lengths: list[int] = []
        real = decoder.cache.run

        def watched(*call: Any) -> Any:
            logits = real(*call)
            lengths.append(logits.shape[1])
            return logits

        monkeypatch.setattr(decoder.cache, "run", watched)
        result = [decoder.prefill(PROMPTS[:2], context=7)]
        result += [decoder.step(PROMPTS[:2, :1]), decoder.step(PROMPTS[:2, 1:2])]
    assert lengths == [1 if choice[1] else 5, 1, 1]
    with OnnxRuntimeRunner(choice[0], threads=1) as runner:
        ids = np.concatenate([PROMPTS[:2], PROMPTS[:2, :2]], axis=1)
        wanted = runner.run(make_inputs(runner.inputs, Shape("prefill", 2, 7), ids))["logits"]
    assert np.abs(np.stack(result, axis=1) - wanted[:, 4:]).max() <= 1e-5


TEXTS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 6, 1, 8, 0, 3, 3, 9]])
MASKS = {
    "left": [[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]],
    "holes": [[1] * 8, [1, 0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1, 0]],
    "right": [[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
    "none": [[1] * 8] * 3,
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(fused_model(FusedSpec()), tmp_path_factory.mktemp("fused"))


@pytest.mark.parametrize("steps", [[8], [6, 1, 1], [4, 3, 1]], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_a_padded_row_gives_what_it_gives_alone(packed: Path, mask: str, steps: list[int]) -> None:
    masks = np.array(MASKS[mask])
    with OnnxRuntimeRunner(packed, threads=1) as runner:
        result, caches = in_steps(runner, TEXTS, masks, steps)
        for row, real in enumerate(masks.astype(bool)):
            ones = np.ones((1, real.sum()))
            wanted, alone = in_steps(runner, TEXTS[row : row + 1, real], ones, [int(real.sum())])
            assert apart(result[row, real], wanted[0]) <= 1e-5
            keys = caches[PAST][row]
            assert np.abs(keys[:, real] - alone[PAST][0]).max() <= 1e-5
            assert not keys[:, ~real].any()
        if mask not in ("none", "right"):  # what is behind is not seen anyway
            other, _ = in_steps(runner, TEXTS, np.ones_like(masks), steps)
            assert np.abs(other - result)[masks.astype(bool)].max() > 1e-2


def test_what_does_not_fit_together_is_refused(packed: Path) -> None:
    with OnnxRuntimeRunner(packed, threads=1) as runner:
        inputs = make_inputs(runner.inputs, Shape("decode", 3, 1, 6), TEXTS[:, :1])
        inputs["attention_mask"] = np.array(MASKS["left"], np.int32)
        with raises(BackendError, "wrong-shape", 8):
            runner.run(inputs)


def test_rows_of_a_prompt_alone_are_moved_too(tmp_path: Path) -> None:
    """What an engine for prompts computes, by its graph on the CPU, against the graph's mask."""
    masked = decoder_onnx(tmp_path, in_place=True)
    model = ir.load(masked)
    assert PromptAlonePass()(model).modified
    shape = Shape("prefill", 2, 8)
    with (
        OnnxRuntimeRunner(masked, threads=1) as whole,
        OnnxRuntimeRunner(saved(model, tmp_path / "prompt"), threads=1) as runner,
    ):
        inputs = make_inputs(whole.inputs, shape, random_tokens(shape, 11))
        inputs["attention_mask"][1, :3] = 0
        inputs["position_ids"][1] = (inputs["position_ids"][1] - 3).clip(min=0)
        wanted = whole.run(inputs, ["logits"])["logits"][:, 3:]
        logits = run_packed(runner.run, inputs, ["logits"], runner.cache_form.shared)["logits"]
        misread = runner.run(inputs, ["logits"])["logits"]
    np.testing.assert_allclose(logits[:, 3:], wanted, atol=1e-5)
    assert np.abs(misread[1, 3:] - wanted[1]).max() > 1e-2
