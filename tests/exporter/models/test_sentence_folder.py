"""Folders of sentence-transformers: what is read of them, what goes with a model, what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from exporter.errors import ModelSourceError, UnsafeInputError
from exporter.models.sentence_folder import (
    MEAN,
    Pooling,
    copy_settings,
    pooling_of,
    read_pooling,
    read_prompts,
    sentence_files,
    settings_hashes,
    stage_companions,
    why_not_whole,
)
from exporter.models.texts.tokenizer import read_tokenizer
from graph_passes.fusing.pooling import MODES, PoolingMode
from tests.raising import raises
from tests.tiny_models import write_dense, write_sentence_files

STATES = np.array([[[1.0, 8.0], [2.0, 4.0], [6.0, 0.0]]])
VECTORS: dict[PoolingMode, list[float]] = {
    "cls": [1, 8],
    "max": [2, 8],
    "mean": [1.5, 6],
    "mean_sqrt_len_tokens": [3 / 2**0.5, 12 / 2**0.5],
    "weightedmean": [5 / 3, 16 / 3],
    "lasttoken": [2, 4],
}


@pytest.mark.parametrize("mode", MODES)
def test_one_vector_is_made_of_the_tokens_without_padding(mode: PoolingMode) -> None:
    result = Pooling((mode,))(STATES, np.array([[1, 1, 0]]))
    assert result[0] == pytest.approx(VECTORS[mode])
    assert Pooling((mode,))(STATES, np.ones((1, 3)))[0] != pytest.approx(VECTORS[mode]) or (
        mode == "cls"
    )


def test_vectors_of_several_modes_have_length_1_together() -> None:
    result = Pooling(("cls", "lasttoken"), normalised=True)(STATES, np.array([[1, 1, 0]]))
    assert result[0] == pytest.approx(np.array([1, 8, 2, 4]) / 85**0.5)


@pytest.mark.torch
@pytest.mark.parametrize("mode", MODES)
def test_pytorch_gives_the_same(mode: PoolingMode) -> None:
    import torch

    mask = torch.tensor([[True, True, False]])
    result = Pooling((mode, "mean"))(torch.tensor(STATES), mask)
    assert result[0].tolist() == pytest.approx([*VECTORS[mode], *VECTORS["mean"]])


@pytest.mark.parametrize(
    ("told", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode_cls_token": False}, ("mean",)),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["mean", "max"]}, ("mean", "max")),
    ],
)
def test_both_ways_to_write_a_pooling(tmp_path: Path, told: Any, modes: Any) -> None:
    write_sentence_files(tmp_path, pooling=told)
    assert read_pooling(tmp_path) == Pooling(modes, normalised=False)
    write_sentence_files(tmp_path, pooling=told, normalise=True)
    assert read_pooling(tmp_path) == pooling_of(tmp_path) == Pooling(modes, normalised=True)


def test_a_folder_without_its_pooling(tmp_path: Path) -> None:
    write_sentence_files(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    for read in (read_pooling, sentence_files):
        with raises(ModelSourceError, "broken-sentence-folder", "1_Pooling/config.json"):
            read(tmp_path)
    (tmp_path / "modules.json").unlink()
    assert sentence_files(tmp_path) == []
    assert pooling_of(tmp_path) == MEAN
    with raises(ModelSourceError, "no-modules", "modules.json"):
        read_pooling(tmp_path)


@pytest.mark.parametrize(
    ("told", "code", "field"),
    [
        ({"pooling_mode": "median"}, "other-pooling", "median"),
        ({"pooling_mode": ["mean", 3]}, "other-pooling", "3"),
        ({"pooling_mode": "mean", "include_prompt": False}, "other-pooling", "1_Pooling"),
    ],
)
def test_poolings_that_no_graph_has(tmp_path: Path, told: Any, code: str, field: str) -> None:
    write_sentence_files(tmp_path, pooling=told)
    with raises(ModelSourceError, code, field):
        read_pooling(tmp_path)


def test_what_is_left_out_leaves_the_folder_s_own_mode(tmp_path: Path) -> None:
    assert (pooling_of(tmp_path), why_not_whole(tmp_path)) == (MEAN, "")
    cls: dict[str, Any] = {"pooling_mode": "cls"}
    write_sentence_files(tmp_path, pooling=cls)
    assert (pooling_of(tmp_path).modes, why_not_whole(tmp_path)) == (("cls",), "")
    write_sentence_files(tmp_path, pooling=cls | {"include_prompt": False})
    assert pooling_of(tmp_path).modes == ("cls",)
    assert "1_Pooling" in why_not_whole(tmp_path)
    write_sentence_files(tmp_path, pooling=cls)
    modules = json.loads((tmp_path / "modules.json").read_text())
    other = {"path": "2_Dropout", "type": "sentence_transformers.models.Dropout"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, other]))
    assert pooling_of(tmp_path).modes == ("cls",)
    assert "Dropout" in why_not_whole(tmp_path)
    write_sentence_files(tmp_path, pooling={"pooling_mode": "median"})
    assert pooling_of(tmp_path) == MEAN
    assert "median" in why_not_whole(tmp_path)


@pytest.mark.parametrize(
    ("modules", "code"),
    [
        (["Transformer", "Dense"], "other-pooling"),
        (["Transformer", "Pooling", "Dense"], "broken-sentence-folder"),
        (["Transformer", "Pooling", "Normalize", "Dense"], "other-pooling"),
        (["Transformer", "Pooling", "Pooling"], "other-pooling"),
        (["Pooling"], "other-pooling"),
        (["Transformer", "Pooling", "Normalize"], None),
        ("{", "broken-sentence-folder"),
        ("{}", "broken-sentence-folder"),
        ("[]", "broken-sentence-folder"),
        ("[3]", "broken-sentence-folder"),
    ],
)
def test_modules_that_a_graph_can_have(tmp_path: Path, modules: Any, code: str | None) -> None:
    write_sentence_files(tmp_path)
    listed = [
        {"path": "1_Pooling" if kind == "Pooling" else "", "type": f"sentence_transformers.{kind}"}
        for kind in modules
    ]
    text = modules if isinstance(modules, str) else json.dumps(listed)
    (tmp_path / "modules.json").write_text(text)
    if code is None:
        assert read_pooling(tmp_path).normalised
        return
    with raises(ModelSourceError, code, "modules.json"):
        read_pooling(tmp_path)
    assert pooling_of(tmp_path) == MEAN or isinstance(modules, list)


def test_a_product_behind_the_pooling(tmp_path: Path) -> None:
    weight, bias = write_dense(tmp_path, inputs=2, outputs=3)
    result, mask = read_pooling(tmp_path), np.array([[1, 1, 0]])
    assert result == pooling_of(tmp_path)
    assert why_not_whole(tmp_path) == ""
    product = np.tanh(weight @ [1.5, 6] + bias)
    assert result(STATES, mask)[0] == pytest.approx(product / np.linalg.norm(product), abs=1e-6)
    assert "2_Dense/model.safetensors" in sentence_files(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("activation", ["Identity", "Tanh", "ReLU", "Sigmoid"])
def test_a_product_of_pytorch_is_the_same(tmp_path: Path, activation: str) -> None:
    import torch

    weight, bias = write_dense(tmp_path, inputs=2, outputs=3, activation=activation)
    mean = torch.tensor([1.5, 6.0]).double()
    product = torch.from_numpy(weight) @ mean + torch.from_numpy(bias)
    expected = getattr(torch.nn, activation)()(product)
    states, mask = torch.tensor(STATES), torch.tensor([[True, True, False]])
    dense = read_pooling(tmp_path).dense
    pools = Pooling(("mean",), dense=dense)
    for item in (pools(states, mask), pools(STATES, mask.int().numpy())):
        assert item[0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        ("activation", "other-pooling"),
        ("missing", "broken-sentence-folder"),
        ("unreadable", "broken-sentence-folder"),
        ("shape", "broken-sentence-folder"),
    ],
)
def test_products_that_no_graph_can_have(tmp_path: Path, broken: str, code: str) -> None:
    activation = "GELU" if broken == "activation" else "Tanh"
    write_dense(tmp_path, inputs=2, outputs=3, activation=activation)
    file = tmp_path / "2_Dense" / "model.safetensors"
    if broken == "missing":
        file.unlink()
    elif broken == "unreadable":
        file.write_bytes(b"numbers")
    elif broken == "shape":
        save_file({"linear.weight": np.zeros(3)}, file)
    with raises(ModelSourceError, code, "2_Dense"):
        read_pooling(tmp_path)
    assert pooling_of(tmp_path).dense == ()
    assert "2_Dense" in why_not_whole(tmp_path)


@pytest.mark.parametrize(
    ("place", "is_elsewhere"),
    [("..", True), ("../1_Pooling", True), ("/1_Pooling", True), ("", True), (3, True),
     ("x" * 300, False)],
)  # fmt: skip
def test_a_pooling_that_is_not_in_the_folder(
    tmp_path: Path, place: Any, is_elsewhere: bool
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_sentence_files(folder)
    write_sentence_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert sentence_files(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = place
    (folder / "modules.json").write_text(json.dumps(modules))
    with raises(ModelSourceError, "broken-sentence-folder"):
        read_pooling(folder)
    if is_elsewhere:
        assert sentence_files(folder) == []
        return
    with raises(ModelSourceError, "broken-sentence-folder"):
        sentence_files(folder)


def test_prompts_by_name_and_by_default(tmp_path: Path) -> None:
    write_sentence_files(tmp_path, prompts={"query": "query: ", "web": "w: "})
    result = read_prompts(tmp_path)
    assert [result.of("query"), result.of("passage", "web"), result.of("passage")] == [
        *("query: ", "w: "),
        "",
    ]
    write_sentence_files(tmp_path, prompts={"query": "query: "}, default_prompt="query")
    assert read_prompts(tmp_path).of("passage") == "query: "
    write_sentence_files(tmp_path, prompts={"query": "query: "}, default_prompt="web")
    with raises(ModelSourceError, "broken-sentence-folder", "web", "query"):
        read_prompts(tmp_path)
    prompts = tmp_path / "config_sentence_transformers.json"
    prompts.write_text(json.dumps({"default_prompt_name": []}))
    with raises(ModelSourceError, "broken-sentence-folder", "[]"):
        read_prompts(tmp_path)
    prompts.unlink()
    assert read_prompts(tmp_path).of("query") == ""


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The source, the output and the stage."""
    for name in ("source", "out", "stage"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "config.json").write_text("{}")
    return tmp_path / "source" / "m.onnx", tmp_path / "out" / "m.onnx", tmp_path / "stage"


def test_a_models_own_files_go_with_it_and_code_and_pickles_do_not(
    places: tuple[Path, Path, Path],
) -> None:
    for name in ("tokenizer.py", "vocab.pkl", "tokenizer.bin", "notes.txt"):
        places[0].with_name(name).write_text("import os")
    moves = stage_companions(*places)
    assert [final.name for _, final in moves] == ["config.json"]
    assert moves[0][0].read_text() == "{}"
    places[1].with_name("config.json").write_text('{"mine": 1}')
    assert stage_companions(*places) == []  # what stands in the output's folder stays


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("chat_template.jinja", "../secret"),
        ("chat_template.jinja", "/proc/self/environ"),
        ("1_Pooling/config.json", "../../secret"),
        ("preprocessor_config.json", "../secret"),
        ("tokenizer.json", "../secret"),
    ],
)
def test_links_out_of_the_folder_are_refused(
    places: tuple[Path, Path, Path], name: str, target: str
) -> None:
    folder = places[0].parent
    sentence_model(folder, MODULES)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(UnsafeInputError):
        stage_companions(*places)
    assert not (places[2] / name).exists()
    if name != "chat_template.jinja":
        with pytest.raises(UnsafeInputError):
            read_tokenizer(folder / name) if "token" in name else settings_hashes(folder)


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


def test_sentence_transformers_files_go_with_a_model_unless_they_are_pickled(
    places: tuple[Path, Path, Path],
) -> None:
    folder, stage = places[0].parent, places[2]
    sentence_model(folder, MODULES)
    moves = stage_companions(*places)
    names = ["config.json", "modules.json", "sentence_bert_config.json", "1_Pooling"]
    assert [final.name for _, final in moves] == names
    assert names_below(stage) == {*names[:3], "1_Pooling/config.json"}
    copy_settings(folder, places[1].parent)
    assert names_below(places[1].parent) == {*names[1:3], "1_Pooling/config.json"}
    folder = places[0].parent
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    sentence_model(folder, [*MODULES[:2], dense])
    assert sentence_files(folder) == []
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"numbers")
    copy_settings(folder, places[2])
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
    for name in ("generation_config.json", "spiece.model"):  # of encoder-decoders
        (folder / name).write_text("{}")
        assert name in settings_hashes(folder, whole=True)
        assert settings_hashes(folder) == before


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
