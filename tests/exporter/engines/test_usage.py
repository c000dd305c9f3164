"""The lines that say how a folder is used run as they stand there, and only where they hold."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import FORM_KEY, FormRecord, PlannedDeletion
from exporter.artifacts.comparison import FolderUses, Use
from exporter.cli import run
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.decoding.generate import generate
from exporter.engines.decoding.open_decoder import open_decoder
from exporter.engines.runners.cache_form import CacheForm
from exporter.engines.usage import (
    UsedModel,
    graph_uses,
    use_place,
    write_graph_use,
)
from exporter.export.forms.genai import write_genai_config
from exporter.models.sentence_folder import MEAN, Pooling
from exporter.report.sections import comparison_document
from exporter.report.sections.use import use_section
from graph_passes import save_model
from graph_passes.files.storage import load_model
from tests.graph_passes.fused_graphs import HEADS, HIDDEN, VOCABULARY, FusedSpec, fused_model
from tests.made_reports import gate_report
from tests.reading import lines_of, run_lines, run_shell
from tests.text_graphs import write_tiny_lm, write_tokenizer

CUT = [PlannedDeletion(layer=1, kind="attention")]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "max_position_embeddings": 16,
}  # fmt: skip


def decoder(folder: Path, **config: Any) -> Path:
    """A decoder of three layers in GroupQueryAttention, with what ships with it."""
    folder.mkdir()
    save_model(fused_model(FusedSpec(layers=3)), folder / "model.onnx")
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
    pasts = {name.split(".")[1] for name in read(cut).pasts}
    assert pasts == {"0", "2"}
    _, result = run_lines(graph_lines(cut), cut)
    tokens = result["tokens"]
    new = read(cut).new_tokens
    assert tokens[-new:] == greedy(cut, tokens[:-new], new)
    assert new == 8  # the graph's tables end at 16


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


@pytest.mark.parametrize("name", ["config.json", "genai_config.json"])
def test_a_config_that_is_none_costs_the_lines_of_a_cut_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    whole = decoder(tmp_path / "whole")
    (whole / name).write_text("{")
    prune_file(whole / "model.onnx", whole / "cut.onnx", CUT, CutOptions(genai_config="none"))
    assert (whole / "cut.onnx").exists()
    assert not (whole / "USE.md").exists()


@pytest.mark.parametrize("key", ["architectures", "model_type"])
@pytest.mark.parametrize("value", [{"a": 1}, 5, [], [["a"]]], ids=str)
def test_a_config_with_values_of_other_types_hinders_no_cut(
    tmp_path: Path, key: str, value: Any
) -> None:
    whole = decoder(tmp_path / "whole", **{key: value})
    prune_file(whole / "model.onnx", whole / "cut.onnx", CUT, CutOptions(verify="none"))
    assert list(lines_of((whole / "USE.md").read_text()))


def test_a_text_ends_where_the_config_says(cut: Path) -> None:
    _, result = run_lines(graph_lines(cut), cut)
    first = result["tokens"][-8]
    (cut / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 99]}))
    _, ended = run_lines(graph_lines(cut), cut)
    assert ended["tokens"] == result["tokens"][:-8]


def test_depthcut_s_line_generates(cut: Path) -> None:
    printed = run_shell(lines_of((cut / "USE.md").read_text())["depthcut"], cut)
    assert printed.split()


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


def test_genai_is_told_of_where_its_config_names_the_graph(cut: Path) -> None:
    assert way(read(cut), "onnxruntime-genai") is None
    result = {"model": {"decoder": {"filename": "other.onnx"}}}
    (cut / "genai_config.json").write_text(json.dumps(result))
    assert way(read(cut), "onnxruntime-genai") is None
    result["model"]["decoder"]["filename"] = "model.onnx"
    (cut / "genai_config.json").write_text(json.dumps(result))
    assert way(read(cut), "onnxruntime-genai") is not None


def test_caches_that_the_lines_can_t_carry_on_have_none(cut: Path) -> None:
    model = read(cut)
    assert way(model, "ONNX Runtime") is not None
    for form in (
        replace(model.form, buffer=64, mask=64),
        replace(model.form, windows={model.pasts[0]: 8}),
        replace(model.form, heads=dict.fromkeys(model.pasts, (2, None))),
    ):
        assert way(replace(model, form=form), "ONNX Runtime") is None
    extra = {**model.inputs, "adapter": ir.Value(name="adapter")}
    assert way(replace(model, inputs=extra), "ONNX Runtime") is None


def test_optimum_is_told_of_where_the_caches_are_as_it_expects(cut: Path) -> None:
    model = read(cut)
    assert way(model, "optimum") is not None
    for config in (
        {**LLAMA, "head_dim": 8}, {**LLAMA, "num_key_value_heads": 1}, {},
        {**LLAMA, "model_type": "bloom"}, {**LLAMA, "architectures": ["OddThing"]},
    ):  # fmt: skip
        assert way(replace(model, config=config), "optimum") is None
    assert way(replace(model, has_tokenizer=False), "optimum") is None
    assert way(replace(model, target="onnxruntime-cuda"), "optimum") is None


def test_without_a_tokenizer_the_lines_take_numbers(tmp_path: Path) -> None:
    folder = write_tiny_lm(tmp_path / "lm", layers=(0, 2))
    write_graph_use(folder / "model.onnx")
    lines = lines_of((folder / "USE.md").read_text())
    assert list(lines) == ["ONNX Runtime"]
    _, result = run_lines(lines["ONNX Runtime"], folder)
    assert len(result["tokens"]) == 3 + 20


def test_a_graph_for_tensorrt_is_built_first(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Syntax only: there is no GPU here to run an engine on."""
    graph = load_model(cut / "model.onnx")
    for target, builds in (("tensorrt-rtx", True), ("onnxruntime-cpu", False)):
        record = FormRecord(target=target, writer="torch 2")
        graph.metadata_props[FORM_KEY] = record.model_dump_json()
        save_model(graph, cut / "model.onnx")
        uses = graph_uses(cut / "model.onnx")
        assert (target in libraries(uses)) is builds
        if builds:
            text = next(use.text for use in uses.uses if use.library == target)
            assert_commands(text.replace("$FOLDER", str(cut)), cut, capsys)


def assert_commands(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line is a call of depthcut with options that there are."""
    for line in text.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "depthcut"
        (folder / "engines").mkdir(exist_ok=True)
        where = {"engines": str(folder / "engines")}
        call = [where.get(argument, argument) for argument in arguments]
        assert run([*call, "--show-config"]) == 0
    capsys.readouterr()


def test_lines_of_a_second_file_have_a_place_of_their_own(cut: Path) -> None:
    assert use_place(cut, "model.onnx") == cut / "USE.md"
    assert use_place(cut, "other.onnx") == cut / "other.onnx.USE.md"
    (cut / "USE.md").write_text("my own notes")
    assert use_place(cut, "model.onnx") == cut / "model.onnx.USE.md"


def test_names_that_could_not_stand_in_code_give_no_lines(cut: Path) -> None:
    odd = cut / "a'); import os; ('.onnx"
    save_model(fused_model(FusedSpec()), odd)
    assert libraries(graph_uses(cut / "model.onnx")) != []
    assert libraries(graph_uses(odd)) == []


def bert(folder: Path, **more: Any) -> UsedModel:
    """What is known of an encoder, without one."""
    folder.mkdir()
    names = ("input_ids", "attention_mask", "token_type_ids")
    config = {"architectures": ["BertModel"], "hidden_size": 8, "num_attention_heads": 2}
    values: dict[str, Any] = {
        "file": "model.onnx", "inputs": {name: ir.Value(name=name) for name in names},
        "outputs": ["last_hidden_state"], "form": CacheForm(), "target": "portable",
        "config": config, "ends": (), "has_tokenizer": True, "has_modules": True, "pooling": MEAN,
        "for_genai": False,
    }  # fmt: skip
    return UsedModel(**{**values, **more})


def test_encoders_are_pooled_as_their_files_say(tmp_path: Path) -> None:
    mean, cls = bert(tmp_path / "a"), bert(tmp_path / "b", pooling=Pooling(("cls",)))
    last, most = (bert(tmp_path / name, pooling=Pooling((name,))) for name in ("lasttoken", "max"))
    head, pixels = bert(tmp_path / "c", outputs=["logits"]), bert(tmp_path / "d", inputs={"x": 1})
    pooled = bert(tmp_path / "e", outputs=["last_hidden_state", "sentence_embedding"])
    models = (mean, cls, last, most, head, pooled)
    uses = [way(model, "ONNX Runtime") for model in models]
    texts = [use.text for use in uses if use is not None]
    after = [text.partition("found =")[2] for text in texts]
    assert ["mask" in text for text in after] == [True, False, True, False, False, False]
    assert ["norm" in text for text in after] == [True, True, True, False, False, True]
    assert ["sentence_embedding" in text for text in texts] == [*[False] * 5, True]
    assert way(pixels, "ONNX Runtime") is None
    assert way(mean, "sentence-transformers") is not None
    assert way(replace(mean, has_modules=False), "sentence-transformers") is None


def test_the_report_shows_lines_that_are_alike_once(cut: Path) -> None:
    uses = [graph_uses(cut / "model.onnx", folder=name) for name in ("candidate", "baseline")]
    report = gate_report(uses=uses)
    section = use_section(report)
    assert section is not None
    shown = [block.text for block in section.blocks if hasattr(block, "language")]
    assert len(shown) == len(uses[0].uses)
    assert shown[0].startswith('FOLDER = "candidate"  # or baseline\n')
    assert section in comparison_document(report).sections
    assert use_section(gate_report()) is None
