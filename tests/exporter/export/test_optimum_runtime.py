"""optimum's own runtime generates with a pruned folder, its cache numbers full of gaps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.usage import write_graph_use
from exporter.export.forms.portable import export_with_optimum
from exporter.export.onnx_output import add_pooling
from exporter.models.sentence_folder import read_pooling
from exporter.quantize.quantize import quantize_file
from exporter.quantize.settings import QuantizeSettings
from graph_passes import Deletion
from graph_passes.files.storage import load_model, save_model
from graph_passes.testing import masked_model
from tests.reading import lines_of, run_lines
from tests.text_graphs import write_tokenizer
from tests.tiny_models import family_loaded, write_sentence_files

pytestmark = pytest.mark.optimum

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
    quantize_file(cut, folder / "model.onnx", QuantizeSettings(scheme="int8"), with_companions=True)
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


def test_sentence_transformers_gives_the_vectors_of_a_cut_in_int8(int8: Path) -> None:
    pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers brings scikit-learn and scipy"
    )
    lines = lines_of((int8 / "USE.md").read_text())
    _, own = run_lines(lines["ONNX Runtime"], int8)
    _, theirs = run_lines(lines["sentence-transformers"], int8)
    assert np.allclose(theirs["vectors"], own["found"], atol=1e-5)
