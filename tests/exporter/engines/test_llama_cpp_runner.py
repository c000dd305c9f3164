"""llama.cpp behind a runner: answers, steps and times, on a stand-in and on the real one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.latency import Shape
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cut.gguf_surgery import cut_gguf
from exporter.engines.decoding.generate import generate, open_decoder, open_model, own_decoder
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.llama_cpp import PAST, PRESENT, LlamaCppRunner
from exporter.engines.tensors import make_inputs, random_tokens
from exporter.errors import BackendError, GgufFileError, MissingDependencyError
from exporter.models.gguf_model_files import gguf_facts, gguf_folder
from exporter.models.texts.tokenizer import GgufTokenizer, encoder_of
from tests.raising import raises
from tests.stand_in.llama_cpp import LlamaCpp
from tests.tiny_gguf import HEAD, KV_HEADS, VOCABULARY, TinyGguf, llama_cpp_logits

_ENDS = ("eos", "eot", "eom")
CLOSE = 2e-2  # keys and values are float16 there, and activations in some products


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaCpp]:
    library = LlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)  # type: ignore[arg-type]
    yield library
    assert not library.alive


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.llama_cpp)])
def library(request: pytest.FixtureRequest) -> Any:
    """Both, in turns: what holds of the one must hold of the other."""
    if request.param == "real":
        return None
    return request.getfixturevalue("stand_in")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    tiny = TinyGguf.llama(layers=4)
    tiny.entries["tokenizer.ggml.model"] = "no_vocab"  # llama.cpp wants more of any other
    tiny.entries["llama.vocab_size"] = ("I", VOCABULARY)
    return tiny.write(tmp_path / "whole.gguf")


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """Without the attentions 1 and 2 and block 3."""
    plan = LoadedPlan.of(
        [PlannedDeletion(layer=n, kind="attention") for n in (1, 2)]
        + [PlannedDeletion(layer=3, kind="block")]
    )
    cut_gguf(whole, tmp_path / "cut.gguf", plan)
    return tmp_path / "cut.gguf"


def call(ids: Any, past: Any = None, mask: Any = None) -> dict[str, Any]:
    tokens = np.array(ids, np.int64)
    before = np.zeros((len(tokens), 1, 0, 1), np.int64) if past is None else past
    total = before.shape[2] + tokens.shape[1]
    real = np.ones((len(tokens), total), np.int64) if mask is None else np.array(mask)
    return {"input_ids": tokens, "attention_mask": real, PAST: before}


def near(got: Any, wanted: Any) -> None:
    assert np.abs(got - wanted).max() <= CLOSE * np.abs(wanted).max()


def test_a_prompt_and_what_goes_on_from_it(library: Any, cut: Path) -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = llama_cpp_logits(cut, tokens)
    with LlamaCppRunner(cut, threads=1) as runner:
        prompt = runner.run(call([tokens[:5]]), phase="prefill")
        near(prompt["logits"][0], wanted[:5])
        assert prompt[PRESENT][0, 0, :, 0].tolist() == tokens[:5]
        step = runner.run(call([[9]], prompt[PRESENT]), ["logits", PRESENT], phase="decode")
        near(step["logits"][0], wanted[5:6])
        near(runner.run(call([tokens[6:]], step[PRESENT]))["logits"][0], wanted[6:])
        other = [7, 7, 1]  # another text in between, and back
        near(runner.run(call([other]))["logits"][0], llama_cpp_logits(cut, other))
        near(runner.run(call([tokens[6:]], step[PRESENT]))["logits"][0], wanted[6:])


def test_padding_stands_anywhere(library: Any, cut: Path) -> None:
    first, second = [3, 1, 4, 1], [5, 9]
    mask = [[1, 1, 1, 1], [0, 1, 0, 1]]
    with LlamaCppRunner(cut, threads=1) as runner:
        result = runner.run(call([first, [0, 5, 0, 9]], mask=mask))
        near(result["logits"][0], llama_cpp_logits(cut, first))
        near(result["logits"][1, [1, 3]], llama_cpp_logits(cut, second))
        assert not result["logits"][1, [0, 2]].any()
        longer = [[*row, 1] for row in mask]
        step = runner.run(call([[2], [6]], result[PRESENT], longer))
        near(step["logits"][1], llama_cpp_logits(cut, [*second, 6])[-1:])


def test_what_is_timed_begins_where_the_call_before_began(library: Any, cut: Path) -> None:
    with LlamaCppRunner(cut, threads=1) as runner:
        bound = []
        for shape in (Shape("prefill", 2, 5), Shape("decode", 3, 1, 4)):
            inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
            bound.append(runner.prepare(inputs, phase=shape.phase))
        for one in (*bound, *bound, *bound):
            one()


def test_a_bound_call_runs_its_new_tokens_alone(stand_in: LlamaCpp, whole: Path) -> None:
    with LlamaCppRunner(whole, threads=3) as runner:
        shape = Shape("decode", 2, 1, 6)
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
        bound = runner.prepare(inputs)
        assert stand_in.threads == 3
        before = stand_in.run_tokens
        bound()
        assert stand_in.run_tokens - before == 2
        before = stand_in.run_tokens
        past = runner.run(call([[1, 2, 3, 4]]))[PRESENT]
        runner.run(call([[5]], past))
        assert stand_in.run_tokens - before == 5
        runner.run(call([[6]], past))  # another end of the same text
        assert stand_in.run_tokens - before == 6


def test_a_state_that_cant_be_taken_back_is_run_again(stand_in: LlamaCpp, whole: Path) -> None:
    stand_in.takes_back = False
    with LlamaCppRunner(whole, threads=1) as runner:
        past = runner.run(call([[1, 2, 3]]))[PRESENT]
        for token in (4, 5):
            got = runner.run(call([[token]], past))["logits"][0]
            near(got, llama_cpp_logits(whole, [1, 2, 3, token])[-1:])
        shape = Shape("decode", 1, 1, 4)
        inputs = make_inputs(runner.inputs, shape, random_tokens(shape, VOCABULARY))
        with raises(BackendError, "state-not-kept", whole, "--generate"):
            runner.prepare(inputs)()


def test_it_generates(library: Any, whole: Path) -> None:
    prompt, wanted = [3, 1, 4], []
    for _ in range(4):
        wanted.append(int(llama_cpp_logits(whole, [*prompt, *wanted])[-1].argmax()))
    with open_decoder(f"llama.cpp:{whole}", threads=1) as decoder:
        assert decoder.backend == "llama.cpp"
        result = generate(decoder, prompt, new_tokens=4)
    assert list(result.token_ids) == wanted


def test_what_generates_for_timing_asks_for_the_last_logits(library: Any, whole: Path) -> None:
    tokens = [3, 1, 4, 1]
    wanted = llama_cpp_logits(whole, tokens)
    with LlamaCppRunner(whole, threads=1, last_logits=True) as runner:
        result = runner.run(call([tokens[:3], tokens[:3]], mask=[[1, 1, 1], [1, 1, 0]]))
        assert result["logits"].shape == (2, 1, VOCABULARY)
        near(result["logits"][0], wanted[2:3])
        assert not result["logits"][1].any()
    decoder = own_decoder(LlamaCppRunner(whole, threads=1))
    assert decoder is not None
    with decoder:
        near(decoder.prefill(np.array([tokens[:3]])), wanted[2:3])
        near(decoder.step(np.array([tokens[3:]])), wanted[3:])


def test_a_context_grows_to_twice_its_length(stand_in: LlamaCpp, whole: Path) -> None:
    stand_in.trained_positions = 700
    with LlamaCppRunner(whole, threads=1) as runner:
        for length in (250, 260, 510, 520, 800):
            runner.run(call([[1] * length]), ["logits"])
    assert stand_in.contexts == [256, 512, 768, 1024]


def test_facts_tell_the_cut(whole: Path, cut: Path) -> None:
    before, after = gguf_facts(whole), gguf_facts(cut)
    token = 2 * 2 * KV_HEADS * HEAD  # keys and values in float16
    assert (before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token) == (
        4 * token,
        token,
    )
    assert before.vocabulary == after.vocabulary == VOCABULARY
    assert (before.precision, before.metadata) == ("f32", {})
    assert after.parameters < before.parameters
    assert "depthcut.plan" in after.metadata


def test_shards_are_one_model(stand_in: LlamaCpp, tmp_path: Path) -> None:
    paths = TinyGguf.llama().write_shards(tmp_path, 3)
    folder, runner = open_model(f"llama.cpp:{paths[1]}", threads=1)
    assert folder.onnx == paths[0]
    assert runner.name == str(paths[0])
    assert gguf_facts(paths[2]).file_bytes == sum(path.stat().st_size for path in paths)


def test_what_llama_cpp_doesnt_load(library: Any, tmp_path: Path) -> None:
    odd = TinyGguf.llama(architecture="llama")
    del odd.tensors["blk.1.attn_q.weight"]
    with raises(BackendError, "load-failed", tmp_path / "odd.gguf"):
        LlamaCppRunner(odd.write(tmp_path / "odd.gguf"), threads=1).__enter__()
    with raises(BackendError, "file-missing", tmp_path / "none.gguf"):
        LlamaCppRunner(tmp_path / "none.gguf", threads=1).__enter__()


def test_what_it_doesnt_take(stand_in: LlamaCpp, whole: Path) -> None:
    with raises(BackendError, "unknown-provider", "cuda", "llama.cpp"):
        LlamaCppRunner(whole, provider="cuda", threads=1)
    runner = LlamaCppRunner(whole, threads=1)
    with raises(BackendError, "not-entered", whole):
        runner.run(call([[1]]))
    with runner:
        with raises(BackendError, "wrong-shape", 3):
            runner.run(call([[1, 2]], mask=[[1, 1, 1]]))
        with raises(BackendError, "token-out-of-range", VOCABULARY):
            runner.run(call([[VOCABULARY]]))
        with raises(BackendError, "wrong-shape", PAST):
            runner.run({"input_ids": np.ones((1, 1)), "attention_mask": np.ones((1, 1))})
        with raises(BackendError, "no-padding", whole):
            runner.prepare(call([[1, 2]], mask=[[0, 1]]))
        stand_in.no_memory = True
        with raises(BackendError, "out-of-memory", "llama_init_from_model"):
            runner.run(call([[1, 2]]))


def test_a_folder_holds_one_gguf_file(stand_in: LlamaCpp, whole: Path, tmp_path: Path) -> None:
    assert open_model(f"llama.cpp:{tmp_path}", threads=1)[0].onnx == whole
    (tmp_path / "no.gguf").write_bytes(b"GGML")
    with raises(GgufFileError, "not-gguf", "no.gguf"):
        open_model(f"llama.cpp:{tmp_path / 'no.gguf'}")


def test_without_llama_cpp(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with raises(MissingDependencyError, "", "llama_cpp", "depthcut[llama-cpp]"):
        LlamaCppRunner(whole, threads=1).__enter__()


def test_tokens_that_end_a_turn_end_a_text(tmp_path: Path) -> None:
    tiny = TinyGguf.llama()
    tiny.entries |= {f"tokenizer.ggml.{end}_token_id": ("I", n) for n, end in enumerate(_ENDS, 5)}
    paths = tiny.write_shards(tmp_path, 2)
    for path in paths:
        texts = TextModel.of(path)
        assert (texts.stop_ids, texts.tokenizer) == ({5, 6, 7}, paths[0])
    assert gguf_folder(paths[1]).end_of_text == 5
    assert TextModel.of(TinyGguf.llama().write(tmp_path / "none.gguf")).stop_ids == set()


def test_a_text_of_more_tokens_than_expected(stand_in: LlamaCpp, whole: Path) -> None:
    usual = encoder_of(whole, GgufTokenizer(whole))("one two three", True)
    stand_in.tokenizer_room = 50
    assert encoder_of(whole, GgufTokenizer(whole))("one two three", True) == usual
    assert len(usual) == 3
    gc.collect()
