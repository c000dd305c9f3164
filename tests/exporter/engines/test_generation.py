"""Generation: with a cache as by recomputing; the texts beside a model; and onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cli import run
from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.decoding.text_model import TextModel
from exporter.engines.runners.cache_form import CacheForm, read_cache_form
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.errors import BackendError, ComparisonError
from exporter.export.forms.genai import genai_config, genai_failure, write_genai_config
from exporter.models.model_folder import find_model
from graph_passes import Deletion, prune_graph
from graph_passes.fusing.logits_to_keep import LogitsToKeepPass
from tests.engine_support import in_steps
from tests.graph_passes.fused_graphs import HEAD_DIM, HEADS, HIDDEN, VOCABULARY, FusedSpec
from tests.graph_passes.fused_graphs import fused_model as fused
from tests.raising import ends_in, raises
from tests.stand_in.decoders import Scripted
from tests.tiny_graphs import TinySpec, saved, tiny_model

PROMPT = [3, 1, 4, 1, 5]
COUNTING = range(1, 9)


def recomputed(path: Path, count: int) -> list[int]:
    ids = list(PROMPT)
    with OnnxRuntimeRunner(path, threads=1) as runner:
        for _ in range(count):
            logits, _ = in_steps(runner, np.array([ids]), np.ones((1, len(ids))), [len(ids)])
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize(("cut", "renumber"), [(False, False), (True, False), (True, True)])
def test_the_cache_changes_nothing(cut: bool, renumber: bool, tmp_path: Path) -> None:
    model = tiny_model(TinySpec(layers=3))
    if cut:
        model, _ = prune_graph(model, [Deletion(1, "attention")], renumber_kv=renumber)
    path = saved(model, tmp_path)
    with open_decoder(path, threads=1) as decoder:
        done = generate(decoder, PROMPT, new_tokens=8)
        again = generate(decoder, PROMPT, new_tokens=8)
    assert list(done.token_ids) == recomputed(path, 8)
    assert again.token_ids == done.token_ids
    assert not done.ended


def test_it_ends_where_the_model_does_or_where_enough_is_there() -> None:
    done = generate(Scripted(COUNTING), [0], new_tokens=8, stop_ids=frozenset({4}))
    assert (done.token_ids, done.ended) == ((1, 2, 3), True)
    decoder = Scripted(COUNTING)
    done = generate(decoder, [0], new_tokens=2, stop_ids=frozenset({4}))
    assert (done.token_ids, done.ended) == ((1, 2), False)
    assert decoder.at == 2  # no step more than was asked for


def test_an_empty_prompt_and_logits_that_are_no_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with raises(BackendError, "no-tokens"):
        generate(Scripted(COUNTING), [], new_tokens=1)
    monkeypatch.setattr(Scripted, "step", lambda *_: np.array([[0.0, np.nan]]))
    with raises(BackendError, "not-finite"):
        generate(Scripted(COUNTING), [0], new_tokens=1)


def test_a_graph_without_a_cache_cannot_generate(tmp_path: Path) -> None:
    with raises(BackendError, "no-kv-cache"):
        open_decoder(saved(tiny_model(TinySpec(cache=False)), tmp_path), threads=1).__enter__()


WORDS = ["Ġa", "Ġb", "c", "ã", "ģ", "Ĥ"]  # the last three are the bytes of one character


def tokenizer(folder: Path, **changes: Any) -> Path:
    """A byte-level tokenizer."""
    pytest.importorskip("tokenizers")
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {word: number for number, word in enumerate(WORDS)}},
        **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ((0, 3, 4, 5, 1), [" a", " a", " a", " aあ", " aあ b", " aあ b"]),
        ((0, 3), [" a", " a", " a\ufffd"]),  # it breaks off within a character
    ],
)
def test_a_character_is_written_when_it_is_whole(
    tokens: tuple[int, ...], shown: list[str], tmp_path: Path
) -> None:
    pieces: list[str] = []
    texts = TextModel.of(tokenizer(tmp_path).parent)
    stream, result = texts.stream(pieces.append), []
    for token in tokens:
        stream.add(token)
        result.append("".join(pieces))
    stream.finish(tokens)
    assert [*result, "".join(pieces)] == shown
    assert texts.decode(tokens) == shown[-1]


@pytest.mark.parametrize(
    ("configs", "stops", "positions"),
    [
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [1, 9]}}, {1, 9},
         None),
        ({"config": {"eos_token_id": 1}, "generation_config": {}}, {1}, None),
        ({"genai_config": {"model": {"eos_token_id": [2, 9], "context_length": 16,
                                     "vocab_size": 11}}}, {2, 9}, 16),
        ({"genai_config": {"model": {"eos_token_id": [2, 9], "context_length": 16}},
          "config": {"eos_token_id": 1, "n_positions": 8}}, {1}, 8),
    ],
)  # fmt: skip
def test_configs_know_what_ends_a_text(
    configs: dict[str, Any], stops: set[int], positions: int | None, tmp_path: Path
) -> None:
    saved(fused(FusedSpec()), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    texts = TextModel.of(tmp_path)
    assert (texts.stop_ids, texts.positions) == (stops, positions)
    assert find_model(tmp_path).longest_sequence == positions
    pytest.importorskip("tokenizers")
    with raises(ComparisonError, "broken-tokenizer"):
        texts.encode("hi")


@pytest.mark.parametrize(
    ("place", "tokenizer", "code"),
    [(".", None, "no-tokenizer"), (".", "nowhere", "no-tokenizer"),
     ("nowhere/model.onnx", None, "file-missing")],
)  # fmt: skip
def test_a_missing_tokenizer_is_told(
    place: str, tokenizer: str | None, code: str, tmp_path: Path
) -> None:
    given = None if tokenizer is None else tmp_path / tokenizer
    with raises(BackendError, code, tmp_path / (tokenizer or Path(place).parent)):
        TextModel.of(tmp_path / place, given)


def test_a_prompt_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    tokenizer(
        tmp_path,
        truncation={
            "max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"
        },
        padding={
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "a",
        },
    )  # fmt: skip
    assert TextModel.of(tmp_path).encode(" a b a b") == [0, 1, 0, 1]


def test_a_tokenizer_elsewhere_brings_the_configs_that_are_missing(tmp_path: Path) -> None:
    file = tokenizer(tmp_path / "model")
    (file.parent / "config.json").write_text('{"n_positions": 7, "eos_token_id": 1}')
    (tmp_path / "engines").mkdir()
    for given in (file, file.parent):
        texts = TextModel.of(tmp_path / "engines", given)
        assert (texts.positions, texts.stop_ids) == (7, {1})
    (tmp_path / "engines" / "config.json").write_text('{"n_positions": 9}')
    assert TextModel.of(tmp_path / "engines", file).positions == 9


PASTS = [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]


def model(**changes: Any) -> Any:
    """What is asked of a PyTorch model."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
    config = SimpleNamespace(**{**sizes, "bos_token_id": 1, **changes})
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=[10, 9]))


@pytest.mark.genai
@pytest.mark.parametrize("cut", [False, True])
def test_the_runtime_generates_what_depthcut_does(tmp_path: Path, cut: bool) -> None:
    import onnxruntime_genai as runtime

    prompt = PROMPT[:4]  # of others the text would hold 10, which ends it and is put off

    graph = fused(FusedSpec(layers=3))
    LogitsToKeepPass()(graph)
    folder = saved(graph, tmp_path / "whole").parent
    loaded: Any = SimpleNamespace(model=model(max_position_embeddings=32))
    assert write_genai_config(loaded, folder)
    if cut:
        plan = [PlannedDeletion(kind="attention", layer=1)]
        prune_file(folder / "model.onnx", tmp_path / "cut" / "model.onnx", plan)
        folder = tmp_path / "cut"
    parameters = runtime.GeneratorParams(whole := runtime.Model(str(folder)))
    length = len(prompt) + 5
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = runtime.Generator(whole, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    wanted = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    with open_decoder(folder, threads=1) as decoder:
        result = [*generate(decoder, prompt, new_tokens=5).token_ids]
    assert result[: len(wanted)] == wanted
    assert wanted
    assert genai_failure(folder) is None
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["head_size"] = 8
    (folder / "genai_config.json").write_text(json.dumps(config))
    reason = genai_failure(folder)
    assert reason
    assert str(folder) not in reason


def test_sizes_and_ids_are_told(tmp_path: Path) -> None:
    form, told_32 = (
        read_cache_form(saved(fused(FusedSpec()), tmp_path)),
        model(max_position_embeddings=32),
    )
    outcome = genai_config(told_32, ["input_ids", "attention_mask", *PASTS], form)
    assert outcome is not None
    result, decoder = outcome["model"], outcome["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (HEAD_DIM, HEADS)
    assert decoder["num_hidden_layers"] == 2
    assert "position_ids" not in decoder["inputs"]
    assert (result["bos_token_id"], result["eos_token_id"], result["pad_token_id"]) == (
        1,
        [10, 9],
        10,
    )
    assert outcome["search"]["past_present_share_buffer"]
    assert result["context_length"] == 32


@pytest.mark.parametrize(
    ("heads", "positions"),
    [
        ([(2, 16), (2, 16)], None),
        ([(2, 16), (1, 16)], 32),
        ([(2, 16), (2, 8)], 32),
        ([(2, None), (2, None)], 32),
    ],
)
def test_what_the_runtime_can_t_be_told_gives_no_config(
    heads: list[tuple[int | None, int | None]], positions: int | None
) -> None:
    sizes = {name: heads[number // 2] for number, name in enumerate(PASTS)}
    changes = {} if positions is None else {"max_position_embeddings": positions}
    assert genai_config(model(**changes), PASTS, CacheForm(heads=sizes)) is None
    usual = CacheForm(heads=dict.fromkeys(PASTS, (2, 16)))
    result = genai_config(model(max_position_embeddings=32), PASTS, usual)
    assert result is not None
    assert not result["search"]["past_present_share_buffer"]


def test_generate_on_onnx_keeps_to_the_model_s_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tiny_model(TinySpec()), tmp_path)
    file = tokenizer(tmp_path / "beside")
    (file.parent / "config.json").write_text(json.dumps({"max_position_embeddings": 6}))
    arguments = ["generate", str(tmp_path), "cc", "--tokenizer", str(file), "--threads", "1"]
    with ends_in(BackendError, "context-too-long", 6, 7, "(2 + 5)"):
        assert run([*arguments, "-n", "5"]) == 2
    assert run([*arguments, "-n", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")
