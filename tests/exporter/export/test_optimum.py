"""optimum's own runtime generates with a pruned folder, its cache numbers full of gaps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.stacks import Stacks
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file, prune_stacks
from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.engines.usage import write_graph_use
from exporter.errors import ExportError
from exporter.export.forms.portable import export_with_optimum
from exporter.export.onnx_output import add_pooling
from exporter.models.loading.model_files import save_pretrained_files
from exporter.models.sentence_folder import read_pooling
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes import Deletion
from graph_passes.files.storage import load_model, save_model
from graph_passes.testing import masked_model
from tests.raising import raises
from tests.reading import data_of, lines_of, names_in, run_lines
from tests.text_graphs import write_tokenizer
from tests.tiny_models import (
    check_export,
    export_onnx,
    family_loaded,
    made_loaded,
    write_sentence_files,
)

pytestmark = [pytest.mark.optimum, pytest.mark.usefixtures("exports_once")]


# The rotary base that SmolLM2 has, and the one that is taken when the config doesn't tell.
BASE, DEFAULT_BASE = 100000.0, 10000.0


@pytest.fixture(scope="module")
def optimum_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    loaded = family_loaded("llama_tied", rope_theta=BASE)
    return loaded, export_with_optimum(loaded, tmp_path_factory.mktemp("llama"))


def test_the_folder_holds_a_plain_graph_and_its_data(optimum_llama: tuple[Any, Path]) -> None:
    loaded, path = optimum_llama
    assert names_in(path.parent) == ["model.onnx", "model.onnx.*.data"]
    graph = ir.load(path).graph
    assert not any(node.op_type == "If" for node in graph)
    names = [value.name for value in graph.inputs]
    assert names[:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    assert [value.name for value in graph.outputs][:2] == ["logits", "present.0.key"]
    weights = sum(p.numel() for p in loaded.model.parameters()) * 4
    table = loaded.model.get_input_embeddings().weight.numel() * 4
    # Equal norms may be stored once; a second copy of the tied table would stand out.
    stored = data_of(path).stat().st_size
    assert weights - table / 4 < stored < weights + table / 4


def test_no_paths_of_this_machine_are_in_the_file(optimum_llama: tuple[Any, Path]) -> None:
    content = optimum_llama[1].read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def test_the_graph_has_the_models_rotary_base(optimum_llama: tuple[Any, Path]) -> None:
    loaded, path = optimum_llama
    checks = check_export(loaded, path)
    assert {check.phase for check in checks} == {"prefill", "decode"}
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)


def test_a_graph_with_another_rotary_base_does_not_pass(optimum_llama: tuple[Any, Path]) -> None:
    misread = family_loaded("llama_tied", rope_theta=DEFAULT_BASE)
    with raises(ExportError, "wrong-results"):
        check_export(misread, optimum_llama[1])


def test_a_cut_of_optimums_graph_equals_pytorch(
    optimum_llama: tuple[Any, Path], tmp_path: Path
) -> None:
    loaded, path = optimum_llama
    deletions = [PlannedDeletion(layer=0, kind="attention")]
    prune_file(path, tmp_path / "model.onnx", deletions)
    checks = check_export(loaded, tmp_path / "model.onnx", deletions=deletions)
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)


def test_an_encoder_exports_without_a_cache(tmp_path: Path) -> None:
    loaded = family_loaded("bert")
    (check,) = check_export(loaded, export_with_optimum(loaded, tmp_path))
    assert check.phase == "encode"
    assert check.max_abs_error < 1e-5


def test_pytorchs_exporter_runs_beside_transformers_4_57(tmp_path: Path) -> None:
    loaded = family_loaded("llama")
    checks = check_export(loaded, export_onnx(loaded, tmp_path))
    assert all(check.passed and check.max_abs_error < 1e-5 for check in checks)


def test_what_optimum_cannot_export_is_one_clear_error(tmp_path: Path) -> None:
    loaded = family_loaded("mamba")
    with raises(ExportError, "exporter-failed", "MambaForCausalLM") as caught:
        export_with_optimum(loaded, tmp_path)
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())


PLAN = [
    PlannedDeletion(layer=0, kind="attention"),
    PlannedDeletion(layer=2, kind="attention"),
    PlannedDeletion(layer=1, kind="mlp"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """optimum's folder of a decoder of four layers, config and all."""
    folder = tmp_path_factory.mktemp("optimum")
    loaded = family_loaded("llama", num_hidden_layers=4, initializer_range=0.2)
    loaded.model.config.architectures = ["LlamaForCausalLM"]
    loaded.model.config.save_pretrained(folder)
    loaded.model.generation_config.save_pretrained(folder)
    return export_with_optimum(loaded, folder)


def folder_with(source: Path, folder: Path) -> Path:
    """A folder for a result, with all of optimum's files but the graph."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source.parent / name, folder)
    return folder


def generated(folder: Path) -> list[list[int]]:
    """Greedy tokens for a batch of two, one of the prompts padded on the left."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model: Any = ORTModelForCausalLM.from_pretrained(folder)
    prompts = torch.tensor([[0, 0, 5, 9, 20], [7, 3, 33, 81, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    made = model.generate(
        input_ids=prompts, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    tokens: list[list[int]] = made[:, prompts.shape[1] :].tolist()
    return tokens


def test_a_pruned_folder_generates_what_the_masked_original_does(
    source: Path, tmp_path: Path
) -> None:
    pruned = folder_with(source, tmp_path / "pruned")
    report = prune_file(source, pruned / "model.onnx", PLAN)
    removed = [name for entry in report.deleted for name in entry.inputs_removed]
    assert removed == [f"past_key_values.{n}.{part}" for n in (0, 2) for part in ("key", "value")]
    assert report.kv_renumbering == {}
    masked = folder_with(source, tmp_path / "masked")
    deletions = [Deletion(d.layer, d.kind) for d in PLAN]
    save_model(masked_model(load_model(source), deletions), masked / "model.onnx")
    tokens = generated(pruned)
    assert [len(row) for row in tokens] == [8, 8]
    assert tokens == generated(masked)
    assert tokens != generated(source.parent)


def test_dense_numbers_generate_the_same(source: Path, tmp_path: Path) -> None:
    gaps = folder_with(source, tmp_path / "gaps")
    dense = folder_with(source, tmp_path / "dense")
    prune_file(source, gaps / "model.onnx", PLAN, CutOptions(verify="none"))
    prune_file(source, dense / "model.onnx", PLAN, CutOptions(verify="none", renumber_kv=True))
    assert generated(gaps) == generated(dense)


def with_tokenizer(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(folder)
    result = {"model_input_names": ["input_ids", "attention_mask"], "pad_token": "[UNK]"}
    file = str(folder / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, **result).save_pretrained(folder)


def test_the_lines_beside_a_pruned_file_generate_with_its_gaps(
    source: Path, tmp_path: Path
) -> None:
    """`prune` has copied the config, without which optimum refuses a folder."""
    with_tokenizer(source.parent)
    prune_file(source, tmp_path / "cut" / "model.onnx", PLAN)
    write_graph_use(tmp_path / "cut" / "model.onnx")
    lines = lines_of((tmp_path / "cut" / "USE.md").read_text())
    _, by_optimum = run_lines(lines["optimum"], tmp_path / "cut")
    _, by_hand = run_lines(lines["ONNX Runtime"], tmp_path / "cut")
    assert by_optimum["tokens"].tolist() == by_hand["tokens"]
    assert len(by_hand["tokens"]) == 5 + 20


@pytest.fixture
def encoder(tmp_path: Path) -> dict[str, str]:
    """The lines for an encoder of sentences; it lies in the folder ``bert``."""
    loaded, folder = family_loaded("bert"), tmp_path / "bert"
    graph = export_with_optimum(loaded, folder)
    loaded.model.config.architectures = ["BertModel"]
    loaded.model.config.save_pretrained(folder)
    with_tokenizer(folder)
    write_sentence_files(folder, normalise=True)
    write_graph_use(graph)
    return lines_of((folder / "USE.md").read_text())


def test_the_lines_beside_an_encoder_run(encoder: dict[str, str], tmp_path: Path) -> None:
    assert "[1, 7, 96]" in run_lines(encoder["optimum"], tmp_path / "bert")[0]


def test_sentence_transformers_gives_the_vectors_of_the_lines_for_onnx_runtime(
    encoder: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers brings scikit-learn and scipy"
    )
    folder = tmp_path / "bert"
    _, theirs = run_lines(encoder["sentence-transformers"], folder)
    _, ours = run_lines(encoder["ONNX Runtime"], folder)
    assert np.allclose(theirs["vectors"], ours["vectors"], atol=1e-5)
    add_pooling(folder, read_pooling(folder))
    write_graph_use(folder / "model.onnx")
    lines = lines_of((folder / "USE.md").read_text())
    _, pooled = run_lines(lines["ONNX Runtime"], folder)
    _, again = run_lines(lines["sentence-transformers"], folder)
    assert np.allclose(theirs["vectors"], pooled["found"], atol=1e-5)
    assert np.allclose(again["vectors"], pooled["found"], atol=1e-5)


@pytest.fixture
def int8(encoder: dict[str, str], tmp_path: Path) -> Path:
    """The encoder without an attention, pooled by its graph, in int8, with its files beside it."""
    whole, folder = tmp_path / "bert", tmp_path / "int8"
    add_pooling(whole, read_pooling(whole))
    cut = tmp_path / "cut" / "model.onnx"
    prune_file(whole / "model.onnx", cut, PLAN[:1], CutOptions(verify="none"))
    quantize_file(cut, folder / "model.onnx", QuantizeSettings(scheme="int8"))
    write_graph_use(folder / "model.onnx")
    return folder


def test_the_class_that_sentence_transformers_loads_runs_a_cut_in_int8(int8: Path) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    _, own = run_lines(lines_of((int8 / "USE.md").read_text())["ONNX Runtime"], int8)
    model: Any = ORTModelForFeatureExtraction.from_pretrained(int8)
    given = {name: torch.from_numpy(array) for name, array in own["feed"].items()}
    states = model(**given).last_hidden_state
    pooled = read_pooling(int8)(states, given["attention_mask"])
    assert np.allclose(pooled.numpy(), own["found"], atol=1e-5)
    assert np.abs(own["found"]).max() > 0.01


STACK_CUTS = [
    [("attention", 1), ("mlp", 2), ("cross_attention", 2)],
    [("mlp", 0), ("attention", 2)],  # fewer self-attentions than cross-attentions
    [("block", 3)],
]


@pytest.mark.parametrize("family", ["whisper", "t5"])
def test_optimum_answers_as_our_runner_does(
    exports_once: None, tmp_path: Path, family: str
) -> None:
    from exporter.export.forms.portable import write_stacks
    from exporter.export.parity import check_stacks

    loaded, whole = made_loaded(family), tmp_path / "whole"
    save_pretrained_files(loaded, whole)
    write_stacks(loaded, whole)
    folders = [whole]
    for number, drops in enumerate(STACK_CUTS):
        plan = [PlannedDeletion(layer=layer, kind=kind) for kind, layer in drops]  # type: ignore[arg-type]
        folders.append(tmp_path / f"cut{number}")
        save_pretrained_files(loaded, folders[-1])
        prune_stacks(whole, folders[-1], plan, Stacks(2, 2))
        assert all(check.passed for check in check_stacks(loaded, folders[-1], deletions=plan))
    answers = [by_optimum(folder, family) for folder in folders]
    assert answers == [by_us(folder, family) for folder in folders]
    assert len(set(map(str, answers))) == len(folders)


def given_to(family: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(3)
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 100, generator=generator)}
    ids = torch.randint(6, 64, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def by_optimum(folder: Path, family: str) -> list[list[int]]:
    import torch
    from optimum import onnxruntime
    from transformers import GenerationMixin

    name = "SpeechSeq2Seq" if family == "whisper" else "Seq2SeqLM"
    model = getattr(onnxruntime, f"ORTModelFor{name}").from_pretrained(folder)
    given = given_to(family)
    first = torch.full((2, 1), 1)
    result = {"decoder_input_ids": first, "max_new_tokens": 9, "do_sample": False, "num_beams": 1}
    if family == "whisper":  # its own way is for recordings, and drops the start token
        outcome = GenerationMixin.generate(model, inputs=given["input_features"], **result)
    else:
        outcome = model.generate(**given, **result)
    rows: list[list[int]] = outcome.tolist()
    return rows


def by_us(folder: Path, family: str) -> list[list[int]]:
    given = {name: tensor.numpy() for name, tensor in given_to(family).items()}
    with EncoderDecoderRunner(folder, threads=1, brief=True) as runner:
        result = runner.generate(given, runner.rules, 9)
    rows: list[list[int]] = result.tolist()
    return rows
