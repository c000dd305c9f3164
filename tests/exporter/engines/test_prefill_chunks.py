"""A prompt in chunks gives what it gives whole: the same logits, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts.latency import Shape
from exporter.engines.decoding.runner_decoder import OnnxRuntimeDecoder, SharedCache
from exporter.engines.inputs import make_inputs
from exporter.engines.runners import onnxruntime as prefill_chunks
from exporter.engines.runners.base import Capabilities
from exporter.engines.runners.onnxruntime import CHUNK_TOKENS, OnnxRuntimeRunner, chunks, in_chunks
from graph_passes import Deletion, prune_graph, save_model
from graph_passes.fusing.logits_to_keep import LogitsToKeepPass
from tests.graph_passes.fused_graphs import FusedSpec, fused_model
from tests.tiny_graphs import TinySpec, tiny_model

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
ROWS = np.repeat(IDS, 2, axis=0)
LEAST = 3
PAST = "past_key_values.0.key"
LIMIT = 1e-5  # float32: a product over more rows may add in another order


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_chunks, "CHUNK_TOKENS", LEAST)


def written(
    folder: Path, model: ir.Model | None = None, *, window: int = -1, kept: bool = False
) -> Path:
    model = fused_model(FusedSpec()) if model is None else model
    assert LogitsToKeepPass()(model).modified
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window)
            node.attributes["sliding_window_cache"] = ir.AttrInt64("sliding_window_cache", kept)
    save_model(model, folder / "model.onnx")
    return folder / "model.onnx"


def forms(folder: Path) -> Iterator[Path]:
    """Whole, in 4 bits, cut, and with attentions that look at a window of 4 positions."""
    cut, _ = prune_graph(fused_model(FusedSpec(layers=3)), [Deletion(1, "attention")])
    for number, model in enumerate([None, fused_model(FusedSpec(int4=True)), cut]):
        yield written(folder / str(number), model)
    yield written(folder / "window", window=4)


def generated(path: Path, ids: Any, *, whole: bool = False) -> tuple[list[int], Any, list[Any]]:
    """The prompt's runs in tokens, the logits after it and after two steps, and the caches."""
    lengths: list[int] = []
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        OnnxRuntimeDecoder(path, threads=1) as decoder,
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


def largest_difference(found: Any, wanted: Any) -> float:
    """As a share of the largest number, if that is above 1."""
    return float(np.abs(found - wanted).max()) / max(1.0, float(np.abs(wanted).max()))


def test_a_generation_is_the_same(tmp_path: Path) -> None:
    for path in forms(tmp_path):
        lengths, logits, caches = generated(path, IDS)
        alone, wanted, wanted_caches = generated(path, IDS, whole=True)
        assert (lengths, alone) == ([3, 4, 4], [11])
        assert largest_difference(logits, wanted) <= LIMIT
        for item, cache in zip(caches, wanted_caches, strict=True):
            assert largest_difference(item, cache) <= LIMIT


def test_chunks_that_forget_the_former_ones_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    _, wanted, _ = generated(path, IDS)
    run = SharedCache.run

    def forgetful(self: SharedCache, tokens: Any, total: int) -> Any:
        if tokens["input_ids"].shape[1] > 1:
            for value in self.buffers.values():
                value.update_inplace(np.zeros(value.shape(), np.float32))
        return run(self, tokens, total)

    monkeypatch.setattr(SharedCache, "run", forgetful)
    assert largest_difference(generated(path, IDS)[1], wanted) > 1e-2


def timed(path: Path, shape: Shape, ids: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bindings of a timed call, which was called once more."""
    bound: list[Any] = []
    real = OnnxRuntimeRunner._bound_inputs
    with monkeypatch.context() as patch, OnnxRuntimeRunner(path, threads=1) as runner:
        patch.setattr(
            OnnxRuntimeRunner,
            "_bound_inputs",
            lambda self, inputs: bound.append(real(self, inputs)) or bound[-1],  # type: ignore[func-returns-value]
        )
        inputs = make_inputs(runner.inputs, shape, ids)
        runner.prepare(inputs)()
        whole = runner.run(inputs)
    keys = bound[-2].values[PAST].numpy()  # the last one is that of the run
    assert largest_difference(keys, whole["present.0.key"]) <= LIMIT
    logits = bound[-2].binding.get_outputs()[0].numpy()
    assert largest_difference(logits[:, -1], whole["logits"][:, -1]) <= LIMIT
    return bound[:-1]


@pytest.mark.parametrize("past", [0, 4])
def test_a_timed_call_does_the_same(
    past: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in forms(tmp_path):
        bound = timed(path, Shape("prefill", 1, 11, past), IDS, monkeypatch)
        assert [item.values["input_ids"].shape()[1] for item in bound] == [3, 4, 4]
        assert len({item.values[PAST].data_ptr() for item in bound}) == 1


@pytest.mark.parametrize(
    ("shape", "ids"),
    [
        (Shape("prefill", 1, 5), IDS[:, :5]),  # hardly longer than a chunk
        (Shape("decode", 1, 1, 11), IDS[:, :1]),
        (Shape("prefill", 2, 11), ROWS),
    ],
    ids=str,
)
def test_what_has_no_two_chunks_or_several_rows_runs_whole(
    shape: Shape, ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(timed(written(tmp_path), shape, ids, monkeypatch)) == 1


def test_several_rows_generate_the_same(tmp_path: Path) -> None:
    path = written(tmp_path)
    lengths, logits, _ = generated(path, ROWS)
    _, wanted, _ = generated(path, IDS)
    assert lengths == [11]
    assert largest_difference(logits[:, :1], wanted) <= LIMIT


def test_judging_asks_for_all_positions_at_once(tmp_path: Path) -> None:
    with OnnxRuntimeRunner(written(tmp_path), threads=1) as runner:
        assert runner.capabilities.prefill_chunk_tokens == LEAST
        inputs = make_inputs(runner.inputs, Shape("prefill", 1, 11), IDS)
        assert runner.run(inputs, ["logits"])["logits"].shape[1] == 11


def test_forms_whose_prompts_run_whole(tmp_path: Path) -> None:
    """A window that is kept alone, a choice of logits that isn't there, a cache that grows."""
    bare = tmp_path / "bare" / "model.onnx"
    save_model(fused_model(FusedSpec()), bare)
    plain = written(tmp_path / "plain", tiny_model(TinySpec(layers=2)))
    for path in (written(tmp_path / "kept", window=4, kept=True), bare, plain):
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
    inputs = {"input_ids": IDS, "attention_mask": mask}
    assert [call["attention_mask"].shape[1] for call in in_chunks(inputs, 5)] == [5, 11]
    mask[0, -1] = 0
    assert len(in_chunks(inputs, 5)) == 1
