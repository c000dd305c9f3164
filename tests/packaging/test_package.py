from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.artifacts import EngineCheck
from exporter.cli import run
from exporter.engines.build.settings import BuildSettings, Profile, ShapeRange
from exporter.engines.packaging import package_triton
from exporter.errors import PackagingError, UsageError
from graph_passes import save_model
from tests.engine_support import written, written_as
from tests.raising import raises
from tests.tiny_graphs import TinySpec, tiny_model


def encode(low: int, usual: int, high: int) -> Profile:
    """A profile for batches of these sizes."""
    shapes = {"low": (low, 1), "usual": (usual, 64), "high": (high, 512)}
    return Profile(phase="encode", shapes={"input_ids": ShapeRange(**shapes)})


TENSORRT: dict[str, Any] = {
    "backend": "tensorrt", "settings": BuildSettings(), "precision": "fp16",
    "profiles": [encode(1, 8, 32)],
    "inputs": [{"name": "input_ids", "dtype": "int64", "shape": (-1, -1)}],
    "outputs": [{"name": "embedding", "dtype": "half", "shape": (-1, 11)}],
}  # fmt: skip

BAD_NAMES = ("../up", "a b", "", "a/b", ".", "..", ".hidden")
TENSORRT_ALONE: dict[str, Any] = {"backend": "tensorrt", "settings": BuildSettings()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "tiny-encoder"
    home.mkdir()
    save_model(tiny_model(TinySpec(layers=2, cache=False)), home / "model.onnx")
    (home / "tokenizer.json").write_text("{}")
    return home


def parsed(config: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())


def test_an_onnx_file_becomes_a_model_of_the_repository(folder: Path, tmp_path: Path) -> None:
    home = package_triton(folder / "model.onnx", tmp_path / "repo", device="cpu")
    assert home == tmp_path / "repo" / "tiny-encoder"
    files = sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())
    assert files == ["1/model.onnx", "config.pbtxt", "tokenizer.json"]
    text = (home / "config.pbtxt").read_text()
    assert 'input { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] }' in text
    assert 'output { name: "logits" data_type: TYPE_FP32 dims: [ -1, 11 ] }' in text
    assert "KIND_CPU" in text


@pytest.mark.parametrize(("most", "fixed"), [(16, False), (1, False), (32, True)])
def test_requests_are_put_together_up_to_the_batch_that_is_asked_for_if_there_is_one(
    folder: Path, tmp_path: Path, most: int, fixed: bool
) -> None:
    model, size = ir.load(folder / "model.onnx"), 0 if fixed or most == 1 else most
    for value in model.graph.inputs if fixed else ():
        value.shape = ir.Shape([1, *value.shape[1:]])
    ir.save(model, folder / "one.onnx")
    home = package_triton(folder / "one.onnx", tmp_path / "repo", max_batch=most)
    text = (home / "config.pbtxt").read_text()
    assert f"max_batch_size: {size}\n" in text
    assert ("dynamic_batching { }" in text) is (size > 1)
    assert ('name: "attention_mask" data_type: TYPE_INT64 dims: [ -1, -1 ]' in text) is (most == 1)


@pytest.mark.parametrize("kind", ["onnx", "engine", "rtx"])
def test_a_decoder_is_refused_with_what_serves_it(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "m.engine"
    if kind == "onnx":
        source = tmp_path / "m.onnx"
        save_model(tiny_model(TinySpec(layers=2)), source)
    else:
        written_as(source, ["decode"], **({} if kind == "rtx" else TENSORRT_ALONE))
    with raises(PackagingError, "decoder", source, "onnxruntime-genai", "depthcut checkpoint"):
        package_triton(source, tmp_path / "repo", name="m")
    assert not (tmp_path / "repo" / "m").exists()


def test_a_model_of_several_files_stands_in_a_folder(folder: Path, tmp_path: Path) -> None:
    model = ir.load(folder / "model.onnx")
    ir.save(model, folder / "big.onnx", external_data="big.data", size_threshold_bytes=0)
    home = package_triton(folder / "big.onnx", tmp_path / "repo")
    assert sorted(p.name for p in (home / "1" / "model.onnx").iterdir()) == [
        "big.data", "model.onnx",
    ]  # fmt: skip


def test_an_engine_of_tensorrt_is_a_plan_with_its_profiles(tmp_path: Path) -> None:
    engine = written(tmp_path, **TENSORRT)
    home = package_triton(engine, tmp_path / "repo", name="llm", instances=2)
    assert (home / "1" / "model.plan").read_bytes() == engine.read_bytes()
    text = (home / "config.pbtxt").read_text()
    assert 'count: 2 kind: KIND_GPU profile: "0"' in text
    assert "max_batch_size: 32\ndynamic_batching { preferred_batch_size: [ 8, 32 ] }\n" in text


@pytest.mark.parametrize(
    ("check", "noted"),
    [
        (None, "not checked"),
        (EngineCheck(card="a card", worst="x", error=0.01, tolerance=0.5), "off by 0.01, a card"),
    ],
)
def test_a_package_says_whether_its_engine_was_checked(
    check: EngineCheck | None, noted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = written(tmp_path, **TENSORRT, check=check)
    assert run(["package", str(engine), "--triton", str(tmp_path / "repo"), "--name", "m"]) == 0
    assert ("not checked" in capsys.readouterr().err) == (check is None)
    text = (tmp_path / "repo" / "m" / "config.pbtxt").read_text()
    assert f'"depthcut.check" value {{ string_value: "{noted}" }}' in text


@pytest.mark.parametrize(
    ("profiles", "batch", "preferred"),
    [
        ([encode(1, 4, 4)], 4, "[ 4 ]"),
        ([encode(1, 1, 16)], 16, "[ 16 ]"),
        ([encode(1, 1, 1)], 0, ""),
        ([encode(4, 4, 8)], 0, ""),  # Triton would send single requests too
        ([encode(1, 8, 32), encode(1, 8, 64)], 0, ""),
    ],
)
def test_an_engine_s_batches_are_those_of_its_profile(
    profiles: list[Profile], batch: int, preferred: str, tmp_path: Path
) -> None:
    engine = written(tmp_path, **{**TENSORRT, "profiles": profiles})
    text = (package_triton(engine, tmp_path / "repo", name="m") / "config.pbtxt").read_text()
    assert f"max_batch_size: {batch}\n" in text
    assert (f"preferred_batch_size: {preferred}" in text) is bool(preferred)


@pytest.mark.parametrize(
    ("built", "options", "word"),
    [
        ({}, {}, "no backend"),
        (TENSORRT, {"device": "cpu"}, "GPU"),
        *((None, {"name": name}, "name") for name in BAD_NAMES),
    ],
)
def test_what_triton_cant_serve_is_refused(
    built: dict[str, Any] | None, options: dict[str, Any], word: str, folder: Path, tmp_path: Path
) -> None:
    source = folder / "model.onnx" if built is None else written(tmp_path, **built)
    with pytest.raises(PackagingError, match=word):
        package_triton(source, tmp_path / "repo", **options)
    assert not [*(tmp_path / "repo").glob("*")]


def test_a_folder_of_another_kind_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "repo" / "tiny-encoder" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(PackagingError, match="tiny-encoder"):
        package_triton(folder / "model.onnx", tmp_path / "repo")
    assert precious.read_text() == "mine"


def test_a_model_never_takes_its_sources_place(folder: Path, tmp_path: Path) -> None:
    home = package_triton(folder / "model.onnx", tmp_path / "repo")
    with pytest.raises(UsageError, match="would be replaced"):
        package_triton(home / "1" / "model.onnx", tmp_path / "repo", name=home.name)
    assert (home / "tokenizer.json").is_file()
    again = package_triton(home / "1" / "model.onnx", tmp_path / "repo", name="copy")
    assert (again / "1" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


@pytest.mark.triton
@pytest.mark.parametrize("kind", ["onnx", "engine"])
def test_tritons_own_protobuf_reads_the_config(kind: str, folder: Path, tmp_path: Path) -> None:
    source = folder / "model.onnx" if kind == "onnx" else written(tmp_path, **TENSORRT)
    config = parsed(package_triton(source, tmp_path / "repo", name="m") / "config.pbtxt")
    assert config.name == "m"
    assert config.backend == ("onnxruntime" if kind == "onnx" else "tensorrt")
    assert config.max_batch_size == 32
    assert config.HasField("dynamic_batching")
    preferred = list(config.dynamic_batching.preferred_batch_size)
    assert preferred == ([] if kind == "onnx" else [8, 32])
    assert config.input[0].name == "input_ids"
    assert list(config.input[0].dims) == [-1]
    assert list(config.instance_group[0].profile) == ([] if kind == "onnx" else ["0"])
    assert len(config.output) == 1


@pytest.mark.parametrize("target", ["/proc/self/environ", "../secret"])
def test_links_out_of_the_folder_are_not_copied(folder: Path, tmp_path: Path, target: str) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "config.json").symlink_to(target)
    arguments = ["package", str(folder), "--triton", str(tmp_path / "repository")]
    assert run(arguments) == 2
    assert not list((tmp_path / "repository").glob("*/*"))


def test_triton_takes_no_engines_for_each_phase(tmp_path: Path) -> None:
    for phase in ("prefill", "decode"):
        written_as(tmp_path / f"m-{phase}.engine", [phase], **TENSORRT_ALONE)
    with pytest.raises(PackagingError, match="holds 2 engines"):
        package_triton(tmp_path, tmp_path / "repo", name="m")
