"""What goes with a model into a result: its own files, and no stranger's links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import UnsafeInputError
from exporter.models.sentence_folder import (
    copy_sentence_files,
    sentence_files,
    settings_hashes,
    stage_companions,
)
from exporter.models.texts.tokenizer import read_tokenizer


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The source, the output and the stage."""
    for name in ("source", "out", "stage"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "config.json").write_text("{}")
    return tmp_path / "source" / "m.onnx", tmp_path / "out" / "m.onnx", tmp_path / "stage"


def test_a_models_own_files_go_with_it(places: tuple[Path, Path, Path]) -> None:
    moves = stage_companions(*places)
    assert [final.name for _, final in moves] == ["config.json"]
    assert moves[0][0].read_text() == "{}"


@pytest.mark.parametrize("name", ["tokenizer.py", "vocab.pkl", "tokenizer.bin", "notes.txt"])
def test_code_and_pickles_do_not(places: tuple[Path, Path, Path], name: str) -> None:
    places[0].with_name(name).write_text("import os")
    assert [final.name for _, final in stage_companions(*places)] == ["config.json"]


def test_what_stands_in_the_outputs_folder_stays(places: tuple[Path, Path, Path]) -> None:
    places[1].with_name("config.json").write_text('{"mine": 1}')
    assert stage_companions(*places) == []


@pytest.mark.parametrize("target", ["../secret", "/proc/self/environ"])
def test_links_out_of_the_folder_do_not(places: tuple[Path, Path, Path], target: str) -> None:
    (places[0].parent / "chat_template.jinja").symlink_to(target)
    with pytest.raises(UnsafeInputError):
        stage_companions(*places)
    assert not (places[2] / "chat_template.jinja").exists()


def test_a_tokenizer_beside_a_graph_is_no_link_out_of_the_folder(
    places: tuple[Path, Path, Path],
) -> None:
    pytest.importorskip("tokenizers")
    path = places[0].with_name("tokenizer.json")
    path.symlink_to("../secret")
    with pytest.raises(UnsafeInputError):
        read_tokenizer(path)


MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def sentence_model(folder: Path, modules: Any) -> None:
    """What sentence-transformers adds to a model's folder, and more than may be copied."""
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "2_Dense" / "pytorch_model.bin").write_text("pickled")
    (folder / "modules.json").write_text(json.dumps(modules))


def test_sentence_transformers_files_go_with_a_model(places: tuple[Path, Path, Path]) -> None:
    folder, stage = places[0].parent, places[2]
    sentence_model(folder, MODULES)
    moves = stage_companions(*places)
    names = ["config.json", "modules.json", "sentence_bert_config.json", "1_Pooling"]
    assert [final.name for _, final in moves] == names
    assert names_below(stage) == {*names[:3], "1_Pooling/config.json"}
    copy_sentence_files(folder, places[1].parent)
    assert names_below(places[1].parent) == {*names[1:3], "1_Pooling/config.json"}


def test_weights_of_a_further_layer_go_with_it_unless_they_are_pickled(
    places: tuple[Path, Path, Path],
) -> None:
    folder = places[0].parent
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    sentence_model(folder, [*MODULES[:2], dense])
    assert sentence_files(folder) == []
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"numbers")
    copy_sentence_files(folder, places[2])
    below = names_below(places[2])
    assert "2_Dense/model.safetensors" in below
    assert "2_Dense/pytorch_model.bin" not in below


@pytest.mark.parametrize(
    "module",
    [
        {"path": "1_Pooling", "type": "somebody.Pooling"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.LSTM"},
        {"path": "../source/1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "/etc", "type": "sentence_transformers.models.Pooling"},
        {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"path": 1, "type": "sentence_transformers.models.Pooling"},
        "1_Pooling",
    ],
)
def test_modules_that_can_t_be_taken_along_leave_it_a_plain_model(
    places: tuple[Path, Path, Path], module: Any
) -> None:
    folder = places[0].parent
    sentence_model(folder, MODULES[:1])
    assert "modules.json" in sentence_files(folder)
    sentence_model(folder, [MODULES[0], module])
    assert sentence_files(folder) == []
    (folder / "modules.json").write_text("{")
    assert sentence_files(folder) == []


def test_a_module_s_link_out_of_the_folder_is_refused(places: tuple[Path, Path, Path]) -> None:
    folder = places[0].parent
    sentence_model(folder, MODULES)
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").symlink_to("../../secret")
    with pytest.raises(UnsafeInputError):
        stage_companions(*places)


def test_what_answers_depend_on_beside_weights_has_hashes(places: tuple[Path, Path, Path]) -> None:
    folder = places[0].parent
    sentence_model(folder, MODULES)
    (folder / "preprocessor_config.json").write_text("{}")
    before = settings_hashes(folder)
    (folder / "README.md").write_text("no setting")
    assert settings_hashes(folder) == before
    for name in ("preprocessor_config.json", "1_Pooling/config.json"):
        path = folder / name
        path.write_text(path.read_text() + " ")
        assert {key for key, own in settings_hashes(folder).items() if own != before[key]} == {name}
        path.write_text(path.read_text()[:-1])
    (folder / "preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").symlink_to("../secret")
    with pytest.raises(UnsafeInputError):
        settings_hashes(folder)


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
