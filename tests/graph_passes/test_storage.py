"""Reading and writing ONNX files: every bad file gives one clear line, every good one its bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graph_passes import Deletion, OnnxFileError, prune_graph
from graph_passes.errors import UnsafeInputError, UnsafeOnnxFileError
from graph_passes.files import storage, weight_file
from graph_passes.files.hashing import sha256_file
from graph_passes.files.storage import data_files, load_model, save_model
from graph_passes.files.weight_file import WeightWriter, read_bytes
from tests.graph_passes.graph_support import feeds, largest_difference, run, session, text, tiny
from tests.raising import raises
from tests.reading import all_data_of, data_of, names_in

PLAN = [Deletion(1, "attention"), Deletion(2, "mlp")]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose tiny weights are in a data file like large ones."""
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # what shapes take
    path = tmp_path / "source" / "model.onnx"
    save_model(tiny("tied"), path)
    return path


def same_function(one: ir.Model, other: ir.Model, *folders: Path) -> bool:
    first, second = (
        session(m, f, optimise=False) for m, f in zip((one, other), folders, strict=True)
    )
    return all(
        largest_difference(run(first, feed), run(second, feed)) == 0.0 for feed in feeds(one)
    )


def test_what_is_saved_can_be_loaded(saved: Path, tmp_path: Path) -> None:
    assert names_in(saved.parent) == ["model.onnx", "model.onnx.*.data"]
    loaded = load_model(saved)
    assert text(loaded) == text(tiny("tied"))
    assert same_function(loaded, tiny("tied"), saved.parent, saved.parent)
    onnx.checker.check_model(str(saved), full_check=True)
    tensors = [value.const_value for value in loaded.graph.initializers.values()]
    save_model(loaded, tmp_path / "again" / "model.onnx")
    after = [value.const_value for value in loaded.graph.initializers.values()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    data = data_of(saved)  # named by what is in it
    assert data.name == f"model.onnx.{sha256_file(data)[:16]}.data"
    assert data_of(tmp_path / "again" / "model.onnx").name == data.name
    assert data_files(load_model(saved)) == [data]


def test_compact_holds_only_the_survivors(saved: Path, tmp_path: Path) -> None:
    pruned, _ = prune_graph(load_model(saved), PLAN)
    target = tmp_path / "new" / "pruned.onnx"
    save_model(pruned, target)
    assert names_in(target.parent) == ["pruned.onnx", "pruned.onnx.*.data"]
    before, after = data_of(saved).stat().st_size, data_of(target).stat().st_size
    assert before - after == 4 * (4 * 8 * 8 + 2 * 8 * 16)  # four projections, two MLP weights
    assert same_function(load_model(target), pruned, target.parent, saved.parent)
    onnx.checker.check_model(str(target), full_check=True)


def test_share_points_into_the_original_of_the_same_folder(saved: Path, tmp_path: Path) -> None:
    pruned, _ = prune_graph(load_model(saved), PLAN)
    target = saved.with_name("pruned.onnx")
    save_model(pruned, target, "share")
    assert names_in(saved.parent) == ["model.onnx", "model.onnx.*.data", "pruned.onnx"]
    assert same_function(load_model(target), pruned, saved.parent, saved.parent)
    with raises(OnnxFileError, "other-folder"):
        save_model(pruned, tmp_path / "elsewhere" / "pruned.onnx", "share")
    assert not (tmp_path / "elsewhere").exists()


def test_a_result_never_overwrites_the_weights_it_comes_from(saved: Path) -> None:
    """Other weights have another name, and the model that was read can still be used."""
    source, data = load_model(saved), data_of(saved)
    before = data.read_bytes()
    pruned, _ = prune_graph(source, PLAN)
    save_model(pruned, saved)
    assert data.read_bytes() == before
    assert [file for file in all_data_of(saved) if file != data] == data_files(load_model(saved))
    assert same_function(load_model(saved), pruned, saved.parent, saved.parent)
    assert same_function(source, tiny("tied"), saved.parent, saved.parent)


@pytest.mark.usefixtures("saved")
def test_one_weight_under_two_names_is_written_once(tmp_path: Path) -> None:
    model = tiny("pre_norm")
    first, second = [v for v in model.graph.initializers.values() if v.const_value.size == 64][:2]  # type: ignore[union-attr]
    first.const_value = second.const_value
    save_model(model, tmp_path / "m.onnx")
    places = {
        tensor.name: tensor.offset
        for tensor in storage.external_tensors(load_model(tmp_path / "m.onnx"))
    }
    assert places[first.name or ""] == places[second.name or ""]
    assert len(set(places.values())) == len(places) - 1


def test_a_data_file_with_two_hard_links_is_read_all_the_same(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "second_name").hardlink_to(data_of(saved))
    model = load_model(saved)
    with pytest.raises(ValueError, match="nlink=2"):
        next(storage.external_tensors(model)).numpy()  # onnx_ir itself refuses
    save_model(prune_graph(model, PLAN)[0], tmp_path / "new" / "pruned.onnx")
    onnx.checker.check_model(str(tmp_path / "new" / "pruned.onnx"), full_check=True)


def test_a_link_inside_the_folder_is_followed(saved: Path) -> None:
    data = data_of(saved)
    data.rename(saved.parent / "blob")
    data.symlink_to("blob")
    assert data_files(load_model(saved)) == [data]


Spoil = Callable[[Path], Any]


def changing(change: Callable[[onnx.ModelProto], Any]) -> Spoil:
    """Changes the graph of a file."""

    def spoil(path: Path) -> None:
        proto = onnx.load(str(path), load_external_data=False)
        change(proto)
        path.write_bytes(proto.SerializeToString())

    return spoil


def external(key: str, value: str) -> Spoil:
    """Says something else of where the weights are."""

    def change(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == key:
                    entry.value = value

    return changing(change)


def sparse_in_a_body(proto: onnx.ModelProto) -> None:
    attribute = proto.graph.node[0].attribute.add()
    attribute.name, attribute.type = "then_branch", onnx.AttributeProto.GRAPH
    attribute.g.sparse_initializer.add()


def text_outside(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type, tensor.data_location = onnx.TensorProto.STRING, onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.onnx")


def body_of_a_function(proto: onnx.ModelProto) -> None:
    attribute = proto.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
    attribute.ref_attr_name = "outer"


def in_bytes(text: bytes) -> Spoil:
    """Spoils a name."""
    return lambda path: path.write_bytes(path.read_bytes().replace(text, text[:-1] + b"\xb2"))


def link_out(path: Path) -> None:
    data = data_of(path)
    data.rename(path.parent.parent / "outside.data")
    data.symlink_to(path.parent.parent / "outside.data")


def above(path: Path) -> None:
    (path.parent.parent / "model.onnx.data").write_bytes(b"0" * 100_000)
    external("location", "../model.onnx.data")(path)


BAD: dict[str, tuple[Spoil, str, object]] = {
    "missing": (Path.unlink, "file-missing", ""),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "incomplete-onnx", ""),
    "empty": (lambda path: os.truncate(path, 0), "incomplete-onnx", ""),
    "text": (lambda path: path.write_text("no model\n" * 40), "incomplete-onnx", ""),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is-a-folder", ""),
    "no data": (lambda path: data_of(path).unlink(), "data-missing", ".data'"),
    "short data": (
        lambda path: os.truncate(data_of(path), data_of(path).stat().st_size - 5),
        "incomplete-onnx", ".data'",
    ),
    "endless data": (lambda path: os.truncate(data_of(path), 1 << 40), "", ".data"),
    "link out": (link_out, "outside-folder", ".data'"),
    "above": (above, "outside-folder", "'../model.onnx.data'"),
    "absolute": (
        lambda path: external("location", str(data_of(path)))(path), "outside-folder", ".data'"
    ),
    "negative": (external("offset", "-64"), "invalid-onnx", -64),
    "wrong length": (external("length", "3"), "incomplete-onnx", 3),
    "no number": (external("offset", "abc"), "invalid-onnx", "'abc'"),
    "no opset": (
        changing(lambda proto: proto.ClearField("opset_import")), "invalid-onnx", "opset_import"
    ),
    "training": (changing(lambda proto: proto.training_info.add()), "invalid-onnx", ""),
    "sparse": (
        changing(lambda proto: proto.graph.sparse_initializer.add()),
        "invalid-onnx", "sparse_initializer",
    ),
    "sparse in a body": (changing(sparse_in_a_body), "invalid-onnx", "sparse_initializer"),
    "given twice": (
        changing(lambda proto: proto.graph.node.add().CopyFrom(proto.graph.node[0])),
        "invalid-onnx", "Output",
    ),
    "zero in a name": (external("location", "a\0b"), "outside-folder", ""),
    "text outside": (changing(text_outside), "", "'w0'"),
    "no type": (
        changing(lambda proto: proto.graph.initializer[0].ClearField("data_type")), "", "'w0'"
    ),
    "body of a function": (changing(body_of_a_function), "", "'n0'"),
    "operator": (in_bytes(b"LayerNormalization"), "", "UTF-8"),
    "input": (in_bytes(b"past_key_values.0.key"), "", "UTF-8"),
    "node": (in_bytes(b"n10"), "", "UTF-8"),
}  # fmt: skip
UNSAFE = ("endless data", "link out", "above", "absolute", "zero in a name")
"""No mere mistakes."""


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_line(saved: Path, name: str) -> None:
    spoil, code, field = BAD[name]
    spoil(saved)
    with raises(OnnxFileError, code, field, saved) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UnsafeOnnxFileError) == (name in UNSAFE)


@pytest.mark.parametrize(
    "spoil", [os.mkfifo, lambda path: (path.touch(), os.truncate(path, 1 << 40))]
)
def test_a_graph_is_a_regular_file_of_sane_size(saved: Path, spoil: Spoil) -> None:
    """Neither waited for nor read; nor is it where it stands beside a result."""
    before = load_model(saved)
    saved.unlink()
    for path in (saved, saved.with_name("beside.onnx")):
        spoil(path)
    with pytest.raises(UnsafeInputError):
        load_model(saved)
    save_model(before, saved.with_name("o") / "m.onnx")
    save_model(before, saved.with_name("m.onnx"))


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_file_cut_anywhere_is_told_or_whole(saved: Path, cut: int) -> None:
    os.truncate(saved, saved.stat().st_size * cut // 40)
    with pytest.raises(OnnxFileError):
        load_model(saved)


def test_a_constant_in_a_data_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.data").write_bytes(np.array([2], np.int64).tobytes())
    path = tmp_path / "m.onnx"
    save_model(tiny("gathered_past"), path)
    loaded = load_model(path)
    tensor = ir.ExternalTensor(
        "c.data", 0, 8, ir.DataType.INT64, shape=ir.Shape([1]), name="c", base_dir=tmp_path
    )
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
    constant.outputs[0].name = "c"
    loaded.graph.insert_before(loaded.graph[0], constant)
    path.write_bytes(ir.to_proto(loaded).SerializeToString())
    value = load_model(path).graph[0].attributes["value"].as_tensor()
    assert not isinstance(value, ir.ExternalTensor)
    assert value.numpy().tolist() == [2]


@pytest.mark.parametrize("named", ["hash", "plain"])
def test_the_data_of_an_earlier_result_goes(saved: Path, tmp_path: Path, named: str) -> None:
    """Also that of an earlier version, which had no hash in its name."""
    target = tmp_path / "out" / "m.onnx"
    save_model(prune_graph(load_model(saved), PLAN)[0], target)
    earlier = data_of(target)
    if named == "plain":
        external("location", "m.onnx.data")(target)
        earlier = earlier.rename(target.with_name("m.onnx.data"))
        assert load_model(target)
    mine = target.with_name("m.onnx.0123456789abcdef.data")
    mine.write_bytes(b"mine")
    save_model(prune_graph(load_model(saved), PLAN[:1])[0], target)
    assert not earlier.exists()
    assert mine.read_bytes() == b"mine"
    assert data_files(load_model(target)) == [file for file in all_data_of(target) if file != mine]


# Where weights stand in a data file, and how they get there

PAGE, LARGE = 4096, 1 << 20


def stored(path: Path, offset: int, length: int, name: str = "w") -> ir.ExternalTensor:
    return ir.ExternalTensor(
        path.name, offset, length, ir.DataType.UINT8,
        shape=ir.Shape([length]), name=name, base_dir=path.parent,
    )  # fmt: skip


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.data"
    path.write_bytes(noise(3 * LARGE + 5 * PAGE))
    return path


def written(tmp_path: Path, tensors: list[Any]) -> list[int]:
    """Writes tensors, makes sure of their bytes, and gives their offsets."""
    target = tmp_path / "target.data"
    with WeightWriter(target) as writer:
        placed = [writer.add(tensor) for tensor in tensors]
    data = target.read_bytes()
    assert len(data) == writer.size
    for tensor, put in zip(tensors, placed, strict=True):
        assert put.offset is not None
        if isinstance(tensor, ir.ExternalTensor):
            begin = tensor.offset or 0
            want = Path(tensor.path).read_bytes()[begin : begin + tensor.nbytes]
        else:
            want = tensor.tobytes()
        assert data[put.offset : put.offset + put.nbytes] == want
    return [put.offset for put in placed if put.offset is not None]


@pytest.mark.parametrize(
    ("at", "within_page"),
    [(0, 0), (PAGE, 0), (64, 64), (PAGE + 192, 192), (7, 0), (32, 0)],
)
def test_a_large_weight_stands_in_a_page_as_in_its_source(
    source: Path, tmp_path: Path, at: int, within_page: int
) -> None:
    large = [stored(source, at, LARGE), stored(source, at + PAGE, LARGE)]
    offsets = written(tmp_path, [stored(source, 5, 100, "small"), *large])
    assert offsets[0] == 0
    assert [offset % PAGE for offset in offsets[1:]] == [within_page] * 2


def test_holes_stay_holes(tmp_path: Path) -> None:
    source = tmp_path / "source.data"
    with source.open("wb") as file:
        file.write(noise(LARGE))
        file.seek(40 * LARGE)
        file.write(noise(LARGE))
        file.truncate(90 * LARGE)
    if source.stat().st_blocks * 512 > 10 * LARGE:
        pytest.skip("this file system writes every zero")
    offsets = written(
        tmp_path,
        [
            stored(source, 0, 41 * LARGE, "a"),
            stored(source, 50 * LARGE, 20 * LARGE, "all hole"),
            stored(source, 40 * LARGE + 4096, 50 * LARGE - 4096, "ends in a hole"),
        ],
    )
    assert offsets[1] == 41 * LARGE
    assert (tmp_path / "target.data").stat().st_blocks * 512 < 10 * LARGE


@pytest.mark.parametrize(
    ("call", "answer"),
    [("copy_file_range", errno.EXDEV), ("copy_file_range", errno.ENOSYS),
     ("copy_file_range", errno.EINVAL), ("copy_file_range", 0), ("lseek", errno.EINVAL)],
)  # fmt: skip
def test_without_the_kernels_help_the_bytes_are_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, answer: int
) -> None:
    """It refuses to copy, copies nothing, or its file system knows no holes."""
    calls = []

    def fails(*arguments: Any) -> int:
        calls.append(arguments)
        if answer:
            raise OSError(answer, "no")
        return 0

    monkeypatch.setattr(os, call, fails)
    monkeypatch.setattr(weight_file, "_PIECE_BYTES", 1000)
    written(tmp_path, [stored(source, 64, LARGE), stored(source, 0, 3000)])
    if call == "copy_file_range" and answer:
        assert len(calls) == 1


def test_a_source_that_ends_too_early_is_told(source: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"source\.data"),
        WeightWriter(tmp_path / "target.data") as writer,
    ):
        writer.add(stored(source, 3 * LARGE, LARGE))


def test_a_weight_is_read_whole_however_little_one_call_gives(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux gives 2 GB at most in one call."""
    right = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, n, at: right(handle, min(n, 1000), at))
    assert read_bytes(stored(source, 7, 2500)) == source.read_bytes()[7:2507]
    with pytest.raises(OSError, match=r"source\.data"):
        read_bytes(stored(source, 3 * LARGE, 6 * PAGE))
