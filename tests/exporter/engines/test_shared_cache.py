"""A cache in one buffer gives what one that grows gives, and copies nothing between steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.decoding.decoder import runner_caches
from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.open_decoder import open_decoder
from exporter.engines.decoding.runner_decoder import (
    GrowingCache,
    HostCache,
    OnnxRuntimeDecoder,
    RunnerDecoder,
    SharedCache,
)
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.cache_form import read_cache_form
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, UsageError
from exporter.models.model_folder import find_model
from graph_passes import Deletion, prune_graph, save_model
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model

PROMPTS = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 6, 1, 8, 0]])
STEPS = np.array([[9, 2, 6], [8, 1, 8], [3, 3, 9]])
ROOM = PROMPTS.shape[1] + STEPS.shape[1]
PAST = "past_key_values.0.key"


def saved(folder: Path, *, layers: int = 3, int4: bool = False, cut: bool = False) -> Path:
    model = fused_model(FusedSpec(layers=layers, int4=int4))
    if cut:
        model, _ = prune_graph(model, [Deletion(1, "attention")])
    return written(model, folder)


def written(model: ir.Model, folder: Path) -> Path:
    save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


@contextmanager
def growing(path: Path) -> Iterator[OnnxRuntimeDecoder]:
    """A decoder on the same graph whose cache grows."""
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        runner = decoder._runner
        decoder._cache = GrowingCache(runner, runner_caches(runner))
        yield decoder


def logits(decoder: OnnxRuntimeDecoder, rows: int) -> list[np.ndarray[Any, Any]]:
    result = [decoder.prefill(PROMPTS[:rows], context=ROOM)]
    return result + [decoder.step(token[:, None]) for token in STEPS[:, :rows]]


def largest_difference(first: Any, second: Any) -> float:
    """As a share of the largest logit, if that is above 1."""
    scale = max(1.0, float(np.abs(second).max()))
    return float(np.abs(np.array(first) - np.array(second)).max()) / scale


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("int4", [False, True])
def test_the_logits_are_those_of_a_cache_that_grows(
    rows: int, cut: bool, int4: bool, tmp_path: Path
) -> None:
    path = saved(tmp_path, cut=cut, int4=int4)
    with growing(path) as decoder:
        wanted = logits(decoder, rows)
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        assert isinstance(decoder.cache, SharedCache)
        result = logits(decoder, rows)
        assert largest_difference(result, wanted) <= 1e-4
        assert (
            largest_difference(logits(decoder, rows), wanted) <= 1e-4
        )  # what is left over is dead


def test_a_step_reads_the_buffer(tmp_path: Path) -> None:
    with OnnxRuntimeDecoder(saved(tmp_path), threads=1) as decoder:
        wanted = logits(decoder, 1)
        decoder.prefill(PROMPTS[:1], context=ROOM)
        assert isinstance(decoder.cache, SharedCache)
        for value in decoder.cache.buffers.values():
            value.update_inplace(np.zeros(value.shape(), np.float32))
        assert largest_difference(decoder.step(STEPS[0, :1, None]), wanted[1]) > 1e-2


def test_nothing_is_copied_between_steps(tmp_path: Path) -> None:
    with OnnxRuntimeDecoder(saved(tmp_path), threads=1) as decoder:
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


def test_a_timed_call_writes_where_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[Any] = []
    real = OnnxRuntimeRunner._bound_inputs
    monkeypatch.setattr(
        OnnxRuntimeRunner,
        "_bound_inputs",
        lambda self, inputs: bound.append(real(self, inputs)) or bound[-1],  # type: ignore[func-returns-value]
    )
    shape = Shape("decode", 2, 1, 4)
    with OnnxRuntimeRunner(saved(tmp_path), threads=1) as runner:
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
    assert largest_difference(first, run) <= 1e-6


def test_a_text_that_outgrows_the_buffer_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        decoder.prefill(PROMPTS, context=6)
        decoder.step(STEPS[0][:, None])
        with raises(BackendError, "cache-too-short", 7, 6):
            decoder.step(STEPS[0][:, None])
    with open_decoder(path, threads=1, context=8) as short:
        assert len(generate(short, [3, 1, 4], new_tokens=6).token_ids) == 6
        with raises(BackendError, "cache-too-short", 8, 3, 7, 9):
            generate(short, [3, 1, 4], new_tokens=7)


def test_an_engine_takes_no_context(tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"")
    with raises(UsageError, "context-fixed", "--cache-length"):
        open_decoder(tmp_path / "model.engine", context=8)


def with_shape(model: ir.Model, *dims: int | str) -> ir.Model:
    for value in model.graph.inputs:
        if "past" in (value.name or ""):
            value.shape = ir.Shape(dims)
    return model


def test_a_graph_may_fix_the_buffer(tmp_path: Path) -> None:
    path = written(with_shape(fused_model(FusedSpec()), "batch", 2, 7, "size"), tmp_path)
    with growing(saved(tmp_path / "free", layers=2)) as free:
        wanted = generate(free, [3, 1, 4], new_tokens=5).token_ids
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        assert generate(decoder, [3, 1, 4], new_tokens=5).token_ids == wanted
        with raises(BackendError, "cache-too-short", 7):
            generate(decoder, [3, 1, 4], new_tokens=6)
    shape = Shape("decode", 1, 1, 7)
    with OnnxRuntimeRunner(path, threads=1) as runner:
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, 11))
        with raises(BackendError, "cache-too-short", "key", 7, 8):
            runner.prepare(inputs)


def test_sizes_that_only_have_a_name_are_found(tmp_path: Path) -> None:
    path = written(with_shape(fused_model(FusedSpec()), "batch", "heads", "past", "size"), tmp_path)
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        assert decoder._specs[PAST].shape == ("batch", 2, "past", 16)
        assert len(generate(decoder, [3, 1, 4], new_tokens=5).token_ids) == 5
    hidden = with_shape(fused_model(FusedSpec()), "batch", 2, "past", "size")
    for node in hidden.graph:
        if node.op_type == "GroupQueryAttention":
            assert node.inputs[0] is not None
            node.inputs[0].shape = None
    with (
        OnnxRuntimeDecoder(written(hidden, tmp_path / "hidden"), threads=1) as decoder,
        raises(BackendError, "head-size-missing", "past_key_values.0.key"),
    ):
        decoder.prefill(PROMPTS)


def test_a_past_that_others_read_grows(tmp_path: Path) -> None:
    model = fused_model(FusedSpec())
    past = next(value for value in model.graph.inputs if value.name == PAST)
    length = ir.node("Shape", [past], {"start": 2, "end": 3})
    length.outputs[0].name = "past_length"
    length.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    length.outputs[0].shape = ir.Shape([1])
    model.graph.append(length)
    model.graph.outputs.append(length.outputs[0])
    path = written(model, tmp_path)
    assert PAST not in read_cache_form(path).shared
    with OnnxRuntimeDecoder(path, threads=1) as decoder:
        assert isinstance(decoder.cache, GrowingCache)
        token_ids = generate(decoder, [3, 1, 4], new_tokens=5).token_ids
    with OnnxRuntimeDecoder(saved(tmp_path / "alone", layers=2), threads=1) as decoder:
        assert isinstance(decoder.cache, SharedCache)
        assert generate(decoder, [3, 1, 4], new_tokens=5).token_ids == token_ids


def test_a_plain_graph_has_a_cache_that_grows(tmp_path: Path) -> None:
    assert not read_cache_form(written(tiny_model(TinySpec(layers=2)), tmp_path)).shared


def test_answers_are_judged_in_place_too(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(saved(tmp_path), threads=1) as runner:
        with RunnerDecoder(runner) as decoder:
            assert isinstance(decoder.cache, SharedCache)
            token_ids = generate(decoder, [3, 1, 4], new_tokens=5).token_ids
        with RunnerDecoder(runner) as other:  # the runner is still entered
            other._cache = HostCache(runner, runner_caches(runner))
            assert generate(other, [3, 1, 4], new_tokens=5).token_ids == token_ids
    plain = written(tiny_model(TinySpec(layers=2)), tmp_path / "plain")
    with OnnxRuntimeRunner(plain, threads=1) as runner, RunnerDecoder(runner) as decoder:
        assert isinstance(decoder.cache, GrowingCache)


def test_the_runtime_s_config_tells_where_texts_end(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    config = {"model": {"eos_token_id": [2, 9], "context_length": 16, "vocab_size": 11}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    texts = TextModel.of(tmp_path)
    assert (texts.stop_ids, texts.positions) == ({2, 9}, 16)
    assert find_model(tmp_path).longest_sequence == 16
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1, "n_positions": 8}))
    texts = TextModel.of(tmp_path)
    assert (texts.stop_ids, texts.positions) == ({1}, 8)


def windowed(folder: Path, window: int, *, kept: bool) -> Path:
    """The first attention looks at a window, and may keep no more in a buffer of its own."""
    model = fused_model(FusedSpec())
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
    node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", int(kept))
    return written(model, folder)


def run_by_run(path: Path, first: int) -> list[np.ndarray[Any, Any]]:
    """The last logits of each of several runs, whose caches are as long as what is in them."""
    arrays = []
    with OnnxRuntimeRunner(path, threads=1) as runner:
        feed = make_inputs(runner.inputs, Shape("prefill", 1, first, 0), PROMPTS[:1, :first])
        for number in range(first, PROMPTS.shape[1] + 1):
            results = runner.run(feed)
            arrays.append(results["logits"][:, -1])
            caches = {past: results[present] for past, present in runner_caches(runner).items()}
            assert {cache.shape[2] for cache in caches.values()} == {number}
            feed = {**feed, **caches, "input_ids": PROMPTS[:1, number : number + 1]}
            feed["attention_mask"] = np.ones((1, number + 1), np.int64)
    return arrays


@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_run_gives_a_window_s_cache_its_room(first: int, tmp_path: Path) -> None:
    """From no past on, which such an attention takes in no buffer shorter than the window."""
    kept = run_by_run(windowed(tmp_path, 3, kept=True), first)
    grown = run_by_run(windowed(tmp_path, 3, kept=False), first)
    whole = run_by_run(windowed(tmp_path, -1, kept=False), first)
    assert len(kept) == PROMPTS.shape[1] + 1 - first
    assert largest_difference(kept, grown) <= 1e-5
    assert largest_difference(kept, whole) > 1e-2
