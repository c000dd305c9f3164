"""The lines that say how a folder is used run as they stand there, and only where they hold."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import FORM_KEY, FormRecord, PlannedDeletion
from exporter.cli import run
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate, open_decoder
from exporter.engines.runners.cache_form import CacheForm
from exporter.engines.usage import (
    FolderUses,
    Use,
    UsedModel,
    graph_uses,
    use_place,
    write_graph_use,
)
from exporter.export.forms.genai import write_genai_config
from exporter.models.sentence_folder import MEAN, Pooling
from graph_passes.files.storage import load_model
from tests.graph_passes.fused_graphs import HEADS, HIDDEN, VOCABULARY, FusedSpec, fused_model
from tests.reading import lines_of, run_lines, run_shell
from tests.text_graphs import write_tiny_lm, write_tokenizer
from tests.tiny_graphs import saved
from tests.tiny_models import family_loaded

FIRST, CUT = ([PlannedDeletion(layer=n, kind="attention")] for n in (0, 1))
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "max_position_embeddings": 16,
}  # fmt: skip


def decoder(folder: Path, **config: Any) -> Path:
    """A decoder of three layers in GroupQueryAttention, with what ships with it."""
    saved(fused_model(FusedSpec(layers=3)), folder)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    return folder


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """The same without its second attention: the caches' numbers are 0 and 2."""
    prune_file(decoder(tmp_path / "whole") / "model.onnx", tmp_path / "cut" / "model.onnx", CUT)
    return tmp_path / "cut"


def greedy(folder: Path, prompt: list[int], new_tokens: int) -> list[int]:
    with open_decoder(folder, threads=1) as model:
        return [*generate(model, prompt, new_tokens=new_tokens).token_ids]


def read(folder: Path) -> UsedModel:
    return UsedModel.read(folder / "model.onnx", [folder])


def graph_lines(folder: Path) -> str:
    """Those for ONNX Runtime itself."""
    write_graph_use(folder / "model.onnx")
    return lines_of((folder / "USE.md").read_text())["ONNX Runtime"]


def way(model: UsedModel, library: str) -> Use | None:
    return next((use for use in model.uses() if use.library == library), None)


def libraries(uses: FolderUses) -> list[str]:
    return [use.library for use in uses.uses]


def test_onnx_runtime_s_lines_generate_with_gaps_between_the_caches(cut: Path) -> None:
    assert {name.split(".")[1] for name in read(cut).pasts} == {"0", "2"}
    _, result = run_lines(graph_lines(cut), cut)
    tokens = result["tokens"]
    new = read(cut).new_tokens
    assert tokens[-new:] == greedy(cut, tokens[:-new], new)
    assert new == 8  # the graph's tables end at 16
    assert run_shell(lines_of((cut / "USE.md").read_text())["depthcut"], cut).split()
    (cut / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[-8], 99]}))
    _, ended = run_lines(graph_lines(cut), cut)
    assert ended["tokens"] == tokens[:-8]


def test_a_cut_tells_how_it_is_used_and_leaves_others_lines(cut: Path, tmp_path: Path) -> None:
    written = (cut / "USE.md").read_text()
    write_graph_use(cut / "model.onnx")
    assert (cut / "USE.md").read_text() == written
    whole = tmp_path / "whole" / "model.onnx"
    prune_file(whole, cut / "second.onnx", CUT)
    assert "second.onnx" in (cut / "second.onnx.USE.md").read_text()
    assert (cut / "USE.md").read_text() == written
    prune_file(whole, tmp_path / "bare" / "model.onnx", CUT, CutOptions(companions=False))
    assert not (tmp_path / "bare" / "USE.md").exists()
    assert use_place(cut, "model.onnx") == cut / "USE.md"
    (cut / "USE.md").write_text("my own notes")
    assert use_place(cut, "model.onnx") == cut / "model.onnx.USE.md"


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("config.json", "{", False),
        ("genai_config.json", "{", False),
        *(("config.json", json.dumps({**LLAMA, key: value}), True)
          for key in ("architectures", "model_type") for value in ({"a": 1}, 5, [], [["a"]])),
    ],
)  # fmt: skip
def test_a_config_that_is_none_costs_the_lines_of_a_cut_and_nothing_else(
    tmp_path: Path, name: str, content: str, lines: bool
) -> None:
    whole = decoder(tmp_path / "whole")
    (whole / name).write_text(content)
    prune_file(whole / "model.onnx", whole / "cut.onnx", CUT, CutOptions(genai_config="none"))
    assert (whole / "cut.onnx").exists()
    assert (whole / "USE.md").exists() == lines
    assert not lines or lines_of((whole / "USE.md").read_text())


@pytest.mark.genai
def test_onnxruntime_genai_s_lines_generate_the_same(tmp_path: Path) -> None:
    folder = decoder(tmp_path / "whole")
    prune_file(folder / "model.onnx", tmp_path / "first" / "model.onnx", CUT)
    _, result = run_lines(graph_lines(tmp_path / "first"), tmp_path / "first")
    end = next(token for token in range(VOCABULARY) if token not in result["tokens"])
    config = SimpleNamespace(
        hidden_size=HIDDEN, num_attention_heads=HEADS, vocab_size=VOCABULARY, eos_token_id=end,
        max_position_embeddings=16,
    )  # fmt: skip
    config.get_text_config = lambda: config
    loaded: Any = SimpleNamespace(
        model=SimpleNamespace(config=config, generation_config=SimpleNamespace())
    )
    assert write_genai_config(loaded, folder)
    prune_file(folder / "model.onnx", tmp_path / "cut" / "model.onnx", CUT)
    lines = lines_of((tmp_path / "cut" / "USE.md").read_text())
    genai, _ = run_lines(lines["onnxruntime-genai"], tmp_path / "cut")
    plain, _ = run_lines(lines["ONNX Runtime"], tmp_path / "cut")
    assert genai == plain
    assert plain.split()


Change = Callable[[UsedModel], UsedModel]
RUNTIME, BERT = "ONNX Runtime", "sentence-transformers"


def form(**changes: Any) -> Change:
    return lambda model: replace(model, form=replace(model.form, **changes))


def but(**changes: Any) -> Change:
    return lambda model: replace(model, **changes)


@pytest.mark.parametrize(
    ("library", "change"),
    [
        (RUNTIME, form(buffer=64, mask=64)),
        (RUNTIME, lambda m: form(windows={m.pasts[0]: 8})(m)),
        (RUNTIME, lambda m: form(heads=dict.fromkeys(m.pasts, (2, None)))(m)),
        (RUNTIME, lambda m: but(inputs={**m.inputs, "adapter": ir.Value(name="adapter")})(m)),
        ("optimum", but(config={**LLAMA, "head_dim": 8})),
        ("optimum", but(config={**LLAMA, "num_key_value_heads": 1})),
        ("optimum", but(config={})),
        ("optimum", but(config={**LLAMA, "model_type": "bloom"})),
        ("optimum", but(config={**LLAMA, "architectures": ["OddThing"]})),
        ("optimum", but(has_tokenizer=False)),
        ("optimum", but(target="onnxruntime-cuda")),
        ("onnxruntime-genai", but(for_genai=False)),
        ("onnxruntime-genai", but(has_tokenizer=False)),
    ],
)
def test_a_library_is_told_of_only_where_its_lines_hold(
    library: str, change: Change, cut: Path
) -> None:
    (cut / "genai_config.json").write_text('{"model": {"decoder": {"filename": "model.onnx"}}}')
    model = read(cut)
    assert way(model, library) is not None
    assert way(change(model), library) is None
    (cut / "genai_config.json").write_text('{"model": {"decoder": {"filename": "other.onnx"}}}')
    assert not read(cut).for_genai


def test_without_a_tokenizer_the_lines_take_numbers(tmp_path: Path) -> None:
    folder = write_tiny_lm(tmp_path / "lm", layers=(0, 2))
    write_graph_use(folder / "model.onnx")
    lines = lines_of((folder / "USE.md").read_text())
    assert list(lines) == ["ONNX Runtime"]
    _, result = run_lines(lines["ONNX Runtime"], folder)
    assert len(result["tokens"]) == 3 + 20


def test_a_graph_for_tensorrt_is_built_first(cut: Path) -> None:
    """Syntax only: there is no GPU here to run an engine on."""
    graph = load_model(cut / "model.onnx")
    (cut / "engines").mkdir()
    for target, builds in (("tensorrt-rtx", True), ("onnxruntime-cpu", False)):
        record = FormRecord(target=target, writer="torch 2")
        graph.metadata_props[FORM_KEY] = record.model_dump_json()
        uses = graph_uses(saved(graph, cut))
        assert (target in libraries(uses)) is builds
        for line in uses.uses[-1].text.splitlines() if builds else ():
            program, *words = shlex.split(line.replace("$FOLDER", str(cut)))
            assert program == "depthcut"
            where = {"engines": str(cut / "engines")}
            assert run([*(where.get(word, word) for word in words), "--show-config"]) == 0


def test_names_that_could_not_stand_in_code_give_no_lines(cut: Path) -> None:
    odd = saved(fused_model(FusedSpec()), cut, "a'); import os; ('.onnx")
    assert libraries(graph_uses(cut / "model.onnx")) != []
    assert libraries(graph_uses(odd)) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, (True, True, False)),
        ({"pooling": Pooling(("cls",))}, (False, True, False)),
        ({"pooling": Pooling(("lasttoken",))}, (True, True, False)),
        ({"pooling": Pooling(("max",))}, (False, False, False)),
        ({"outputs": ["logits"]}, (False, False, False)),
        ({"outputs": ["last_hidden_state", "sentence_embedding"]}, (False, True, True)),
        ({"inputs": {"x": 1}}, None),
    ],
)
def test_encoders_are_pooled_as_their_files_say(
    given: dict[str, Any], told: tuple[bool, bool, bool] | None
) -> None:
    """Whether the lines look at a mask, norm the vectors, and read the graph's own."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    config = {"architectures": ["BertModel"], "hidden_size": 8, "num_attention_heads": 2}
    values: dict[str, Any] = {
        "file": "model.onnx", "inputs": {name: ir.Value(name=name) for name in names},
        "outputs": ["last_hidden_state"], "form": CacheForm(), "target": "portable",
        "config": config, "ends": (), "has_tokenizer": True, "has_modules": True, "pooling": MEAN,
        "for_genai": False,
    }  # fmt: skip
    model = UsedModel(**{**values, **given})
    assert way(model, BERT) is not None
    assert way(replace(model, has_modules=False), BERT) is None
    use = way(model, RUNTIME)
    if told is None or use is None:
        assert told is use is None
        return
    after = use.text.partition("found =")[2]
    assert ("mask" in after, "norm" in after, "sentence_embedding" in use.text) == told


def exported(family: str, folder: Path) -> Path:
    from exporter.export.torch_export import export_onnx
    from exporter.models.loading.model_files import save_pretrained_files

    loaded = family_loaded(family, initializer_range=0.2)
    export_onnx(loaded, folder, opset=20)
    save_pretrained_files(loaded, folder)
    write_tokenizer(folder)
    return folder / "model.onnx"


@pytest.mark.torch
@pytest.mark.usefixtures("exports_once")
def test_an_exported_decoder_generates_what_depthcut_does(tmp_path: Path) -> None:
    """Its caches grow."""
    target = tmp_path / "cut" / "model.onnx"
    prune_file(exported("llama", tmp_path / "whole"), target, FIRST)
    write_graph_use(target)
    lines = lines_of(target.with_name("USE.md").read_text())
    assert list(lines) == ["ONNX Runtime", "depthcut", "optimum"]
    _, result = run_lines(lines["ONNX Runtime"], target.parent)
    tokens = result["tokens"]
    assert tokens[5:] == greedy(target.parent, tokens[:5], len(tokens) - 5)


@pytest.mark.torch
@pytest.mark.usefixtures("exports_once")
def test_an_encoder_s_sentences_have_cosines(tmp_path: Path) -> None:
    graph = exported("bert", tmp_path / "bert")
    write_graph_use(graph)
    lines = lines_of(graph.with_name("USE.md").read_text())
    assert list(lines) == ["ONNX Runtime", "optimum"]
    _, result = run_lines(lines["ONNX Runtime"], graph.parent)
    assert result["vectors"].shape == (2, 96)
    assert np.allclose(np.linalg.norm(result["vectors"], axis=1), 1)
