"""Reading and writing ONNX files: every bad file gives one clear line, every good one its bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_support import feeds, largest_difference, run, session, text, tiny

from graph_passes import Deletion, OnnxFileError, prune_graph
from graph_passes.errors import UnsafeInputError, UnsafeOnnxFileError
from graph_passes.files import storage
from graph_passes.files.hashing import sha256_file
from graph_passes.files.storage import Weights, data_files, load_model, save_model
from tests.raising import raises
from tests.reading import all_data_of, data_of, names_in

PLAN = [Deletion(1, "attention"), Deletion(2, "mlp")]


@pytest.fixture(autouse=True)
def _all_weights_external(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights go to the data file like large ones."""
    monkeypatch.setattr(storage, "_INLINE_BYTES", 32)  # what shapes take


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "model.onnx"
    save_model(tiny("tied"), path)
    return path


def same_function(one: ir.Model, other: ir.Model, folders: tuple[Path, Path]) -> bool:
    first, second = (
        session(m, f, optimise=False) for m, f in zip((one, other), folders, strict=True)
    )
    return all(
        largest_difference(run(first, feed), run(second, feed)) == 0.0 for feed in feeds(one)
    )


def test_what_is_saved_can_be_loaded(saved: Path) -> None:
    assert names_in(saved.parent) == ["model.onnx", "model.onnx.*.data"]
    loaded = load_model(saved)
    assert text(loaded) == text(tiny("tied"))
    assert same_function(loaded, tiny("tied"), (saved.parent, saved.parent))
    onnx.checker.check_model(str(saved), full_check=True)


def test_compact_holds_only_the_survivors(saved: Path, tmp_path: Path) -> None:
    pruned, _ = prune_graph(load_model(saved), PLAN)
    target = tmp_path / "new" / "pruned.onnx"
    save_model(pruned, target)
    assert names_in(target.parent) == ["pruned.onnx", "pruned.onnx.*.data"]
    before, after = data_of(saved).stat().st_size, data_of(target).stat().st_size
    assert before - after == 4 * (4 * 8 * 8 + 2 * 8 * 16)  # four projections, two MLP weights
    assert same_function(load_model(target), pruned, (target.parent, saved.parent))
    onnx.checker.check_model(str(target), full_check=True)


def test_share_points_into_the_original(saved: Path) -> None:
    pruned, _ = prune_graph(load_model(saved), PLAN)
    target = saved.with_name("pruned.onnx")
    save_model(pruned, target, "share")
    assert names_in(saved.parent) == ["model.onnx", "model.onnx.*.data", "pruned.onnx"]
    assert same_function(load_model(target), pruned, (saved.parent, saved.parent))


def test_share_with_another_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    pruned, _ = prune_graph(load_model(saved), PLAN)
    with raises(OnnxFileError, "other-folder"):
        save_model(pruned, tmp_path / "elsewhere" / "pruned.onnx", "share")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("weights", ["compact", "share"])
def test_the_same_bytes_every_time(saved: Path, weights: Weights) -> None:
    results = []
    for name in ("one", "two"):
        pruned, _ = prune_graph(load_model(saved), PLAN)
        target = saved.parent / f"{name}.onnx"
        save_model(pruned, target, weights)
        data = all_data_of(target)
        graph = target.read_bytes().replace(f"{name}.onnx".encode(), b"xxx.onnx")
        results.append((graph, [file.read_bytes() for file in data]))
    assert results[0] == results[1]


def test_saving_leaves_the_model_as_it_was(saved: Path, tmp_path: Path) -> None:
    model = load_model(saved)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    save_model(model, tmp_path / "copy.onnx")
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))


def test_a_result_never_overwrites_the_weights_it_comes_from(saved: Path) -> None:
    """Other weights have another name, and the model that was read can still be used."""
    source, data = load_model(saved), data_of(saved)
    before = data.read_bytes()
    pruned, _ = prune_graph(source, PLAN)
    save_model(pruned, saved)
    assert data.read_bytes() == before
    assert [file for file in all_data_of(saved) if file != data] == data_files(load_model(saved))
    assert same_function(load_model(saved), pruned, (saved.parent, saved.parent))
    assert same_function(source, tiny("tied"), (saved.parent, saved.parent))


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


def _missing_file(path: Path) -> None:
    path.unlink()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("This is no model, but a page of text.\n" * 40)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _missing_data(path: Path) -> None:
    data_of(path).unlink()


def _short_data(path: Path) -> None:
    data = data_of(path)
    data.write_bytes(data.read_bytes()[:-5])


def _link_out(path: Path) -> None:
    data = data_of(path)
    data.rename(path.parent.parent / "outside.data")
    data.symlink_to(path.parent.parent / "outside.data")


def _rewrite(path: Path, key: str, value: str) -> None:
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    path.write_bytes(proto.SerializeToString())


def _above(path: Path) -> None:
    (path.parent.parent / "model.onnx.data").write_bytes(b"0" * 100_000)
    _rewrite(path, "location", "../model.onnx.data")


def _absolute(path: Path) -> None:
    _rewrite(path, "location", str(data_of(path)))


def _negative(path: Path) -> None:
    _rewrite(path, "offset", "-64")


def _no_number(path: Path) -> None:
    _rewrite(path, "offset", "abc")


def _rewritten(path: Path, change: Callable[[onnx.ModelProto], Any]) -> None:
    proto = onnx.load(str(path), load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def _no_opset(path: Path) -> None:
    _rewritten(path, lambda proto: proto.ClearField("opset_import"))


def _training(path: Path) -> None:
    _rewritten(path, lambda proto: proto.training_info.add())


def _sparse(path: Path) -> None:
    _rewritten(path, lambda proto: proto.graph.sparse_initializer.add())


def _sparse_in_a_body(path: Path) -> None:
    def change(proto: onnx.ModelProto) -> None:
        attribute = proto.graph.node[0].attribute.add()
        attribute.name, attribute.type = "then_branch", onnx.AttributeProto.GRAPH
        attribute.g.sparse_initializer.add()

    _rewritten(path, change)


def _value_given_twice(path: Path) -> None:
    _rewritten(path, lambda proto: proto.graph.node.add().CopyFrom(proto.graph.node[0]))


def _wrong_length(path: Path) -> None:
    _rewrite(path, "length", "3")


@pytest.mark.parametrize(
    ("spoil", "code", "field"),
    [
        (_missing_file, "file-missing", ""),
        (_truncated, "incomplete-onnx", ""),
        (_empty, "incomplete-onnx", ""),
        (_text, "incomplete-onnx", ""),
        (_folder, "is-a-folder", ""),
        (_missing_data, "data-missing", ".data'"),
        (_short_data, "data-too-short", ".data'"),
        (_link_out, "outside-folder", ".data'"),
        (_above, "outside-folder", "'../model.onnx.data'"),
        (_absolute, "outside-folder", ".data'"),
        (_negative, "invalid-onnx", -64),
        (_wrong_length, "wrong-size", 3),
        (_no_number, "invalid-onnx", "'abc'"),
        (_no_opset, "no-opset", "opset_import"),
        (_training, "training-info", ""),
        (_sparse, "sparse-weights", "sparse_initializer"),
        (_sparse_in_a_body, "sparse-weights", "sparse_initializer"),
        (_value_given_twice, "invalid-onnx", "Output"),
    ],
)
def test_a_bad_file_is_one_clear_line(
    saved: Path, spoil: Callable[[Path], None], code: str, field: object
) -> None:
    spoil(saved)
    with raises(OnnxFileError, code, field) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


def _endless_data(path: Path) -> None:
    os.truncate(data_of(path), 1 << 40)


@pytest.mark.parametrize("spoil", [_link_out, _above, _absolute, _endless_data])
def test_data_outside_of_the_folder_or_without_end_is_no_mere_mistake(
    saved: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(saved)
    with pytest.raises(UnsafeOnnxFileError):
        load_model(saved)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _terabyte(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("spoil", [_pipe, _terabyte])
def test_a_graph_is_a_regular_file_of_sane_size(saved: Path, spoil: Callable[[Path], None]) -> None:
    """Neither waited for nor read; nor is it where it stands beside a result."""
    before = load_model(saved)
    beside = saved.with_name("beside.onnx")
    for path in (saved, beside):
        path.touch()
        spoil(path)
    with pytest.raises(UnsafeInputError):
        load_model(saved)
    save_model(before, saved.with_name("o") / "m.onnx")
    save_model(before, saved.with_name("m.onnx"))


@pytest.mark.parametrize("spoil", [_missing_data, _short_data])
def test_data_that_is_not_whole_is_a_mistake(saved: Path, spoil: Callable[[Path], None]) -> None:
    spoil(saved)
    with pytest.raises(OnnxFileError) as caught:
        load_model(saved)
    assert not isinstance(caught.value, UnsafeOnnxFileError)


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_file_cut_anywhere_is_told_or_whole(saved: Path, cut: int) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) * cut // 40])
    with pytest.raises(OnnxFileError):
        load_model(saved)


def test_a_constant_in_a_data_file_is_read(tmp_path: Path) -> None:
    model = tiny("gathered_past")
    content = np.array([2], np.int64)
    (tmp_path / "c.data").write_bytes(content.tobytes())
    path = tmp_path / "m.onnx"
    save_model(model, path)
    loaded = load_model(path)
    external = ir.ExternalTensor(
        "c.data", 0, 8, ir.DataType.INT64, shape=ir.Shape([1]), name="c", base_dir=tmp_path
    )
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", external)])
    constant.outputs[0].name = "c"
    loaded.graph.insert_before(loaded.graph[0], constant)
    path.write_bytes(ir.to_proto(loaded).SerializeToString())
    again = load_model(path)
    value = again.graph[0].attributes["value"].as_tensor()
    assert not isinstance(value, ir.ExternalTensor)
    assert value.numpy().tolist() == [2]


def test_weights_are_named_by_what_is_in_them(saved: Path, tmp_path: Path) -> None:
    data = data_of(saved)
    assert data.name == f"model.onnx.{sha256_file(data)[:16]}.data"
    assert [Path(tensor.path) for tensor in storage.external_tensors(load_model(saved))]
    assert data_files(load_model(saved)) == [data]
    save_model(load_model(saved), tmp_path / "again" / "model.onnx")
    assert data_of(tmp_path / "again" / "model.onnx").name == data.name


@pytest.mark.parametrize("named", ["hash", "plain"])
def test_the_data_of_an_earlier_result_goes(saved: Path, tmp_path: Path, named: str) -> None:
    """Also that of an earlier version, which had no hash in its name."""
    target = tmp_path / "out" / "m.onnx"
    save_model(prune_graph(load_model(saved), PLAN)[0], target)
    earlier = data_of(target)
    if named == "plain":
        _rewrite(target, "location", "m.onnx.data")
        earlier = earlier.rename(target.with_name("m.onnx.data"))
        assert load_model(target)
    mine = target.with_name("m.onnx.0123456789abcdef.data")
    mine.write_bytes(b"mine")
    save_model(prune_graph(load_model(saved), PLAN[:1])[0], target)
    assert not earlier.exists()
    assert mine.read_bytes() == b"mine"
    assert data_files(load_model(target)) == [file for file in all_data_of(target) if file != mine]
