"""Weights whose writing was cut short: what stands is gone on with, and nothing else is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.errors import OnnxFileError
from graph_passes.files import unfinished as module
from graph_passes.files.storage import load_model, write_files
from graph_passes.files.unfinished import Unfinished

COUNT, FLOATS = 4, 300_000  # over a megabyte each, so that each begins a page
Asked = list[str]


def graph(asked: Asked, *, stop_at: int = COUNT, error: BaseException | None = None) -> ir.Model:
    """A sum of weights that note who asked for them; asking for one raises."""
    names = [f"w{n}" for n in range(COUNT)]
    inputs = ", ".join(f"float[{FLOATS}] {name}" for name in ["x", *names])
    made = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => (y) '
        f"{{ y = Sum(x, {', '.join(names)}) }}"
    )
    for number, value in enumerate(list(made.graph.inputs)[1:]):
        value.const_value = ir.LazyTensor(
            _reader(number, asked, stop_at, error), ir.DataType.FLOAT, ir.Shape([FLOATS]),
            name=value.name,
        )  # fmt: skip
        made.graph.register_initializer(value)
    del made.graph.inputs[1:]
    return made


def _reader(
    number: int, asked: Asked, stop_at: int, error: BaseException | None
) -> Callable[[], ir.TensorProtocol]:
    def read() -> ir.TensorProtocol:
        if number == stop_at and error is not None:
            raise error
        asked.append(f"w{number}")
        return ir.tensor(np.full(FLOATS, number + 1, np.float32))

    return read


@pytest.fixture(autouse=True)
def noting_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOTE_EVERY_BYTES", 1)


def written(tmp_path: Path, model: ir.Model, key: str = "key") -> list[Path]:
    target = tmp_path / "out"
    target.mkdir(exist_ok=True)
    return write_files(
        model, target, "m.onnx", "compact", unfinished=Unfinished(tmp_path / "left", key)
    )


def interrupted(tmp_path: Path, error: BaseException | None = None) -> Asked:
    asked: Asked = []
    error = error or KeyboardInterrupt()
    with pytest.raises(type(error)):
        written(tmp_path, graph(asked, stop_at=2, error=error))
    assert not list((tmp_path / "out").iterdir())
    return asked


def test_an_interrupted_run_is_gone_on_with(tmp_path: Path) -> None:
    assert interrupted(tmp_path) == ["w0", "w1"]
    asked: Asked = []
    data, file = written(tmp_path, graph(asked))
    assert asked == ["w2", "w3"]
    whole = tmp_path / "whole"
    whole.mkdir()
    fresh, plain = write_files(graph([]), whole, "m.onnx", "compact")
    assert data.read_bytes() == fresh.read_bytes()
    assert file.read_bytes() == plain.read_bytes()
    values = load_model(file).graph.initializers
    assert [float(values[f"w{n}"].const_value.numpy()[-1]) for n in range(COUNT)] == [1, 2, 3, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("other", ["none", "a new file", "the same file"])
def test_what_fails_after_the_writing_keeps_it(tmp_path: Path, other: str) -> None:
    left, out = Unfinished(tmp_path / "left", "key"), tmp_path / "out"
    out.mkdir()

    def stopped_after_writing() -> None:
        with left.until_done(out):
            data, _ = write_files(graph([]), out, "m.onnx", "compact", unfinished=left)
            # A pass may have written weights of its own since.
            if other == "a new file":
                data.unlink()
                data.write_bytes(b"other weights")
            if other == "the same file":
                data.write_bytes(b"x" * data.stat().st_size)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_after_writing()
    asked: Asked = []
    written(tmp_path, graph(asked))
    assert asked == ([] if other == "none" else ["w0", "w1", "w2", "w3"])


def test_at_the_end_nothing_is_left(tmp_path: Path) -> None:
    left, out = Unfinished(tmp_path / "left", "key"), tmp_path / "out"
    out.mkdir()
    with left.until_done(out):
        data, _ = write_files(graph([]), out, "m.onnx", "compact", unfinished=left)
    assert data.stat().st_size > COUNT * FLOATS * 4
    assert not left.folder.exists()


def test_of_other_weights_nothing_is_taken(tmp_path: Path) -> None:
    interrupted(tmp_path)
    asked: Asked = []
    written(tmp_path, graph(asked), key="another model")
    assert asked == ["w0", "w1", "w2", "w3"]


def test_what_was_written_over_is_not_taken_for_what_was_noted(tmp_path: Path) -> None:
    interrupted(tmp_path)

    model = graph([], stop_at=3, error=KeyboardInterrupt())
    with pytest.MonkeyPatch.context() as patch:  # a process that is killed notes nothing down
        patch.setattr(module._NotingWriter, "_note_down", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, model, key="another model")
    assert (tmp_path / "left" / "m.onnx.data").stat().st_size > 3 * 4 * FLOATS
    asked: Asked = []
    written(tmp_path, graph(asked))
    assert asked == ["w0", "w1", "w2", "w3"]


@pytest.mark.parametrize("constant", [1.0, 2.0])
def test_constants_of_another_graph_are_other_weights(tmp_path: Path, constant: float) -> None:
    """Another form of the same model has its weights under the same names."""

    def with_constant(value: float, asked: Asked, **options: Any) -> ir.Model:
        made = graph(asked, **options)
        made.graph.initializers["w0"].const_value = ir.tensor(
            np.full(FLOATS, value, np.float32), name="w0"
        )
        return made

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, with_constant(1.0, [], stop_at=2, error=KeyboardInterrupt()))
    asked: Asked = []
    data, _ = written(tmp_path, with_constant(constant, asked))
    assert asked == (["w2", "w3"] if constant == 1.0 else ["w1", "w2", "w3"])
    assert np.fromfile(data, np.float32)[0] == constant


@pytest.mark.parametrize("spoil", ["note", "data"])
def test_what_is_not_sure_is_written_again(tmp_path: Path, spoil: str) -> None:
    interrupted(tmp_path)
    name = {"note": "written.json", "data": "m.onnx.data"}[spoil]
    (tmp_path / "left" / name).write_bytes(b"{")
    asked: Asked = []
    data, _ = written(tmp_path, graph(asked))
    assert asked == ["w0", "w1", "w2", "w3"]
    assert np.fromfile(data, np.float32)[0] == 1.0


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert not (tmp_path / "left").exists()


def test_another_failure_keeps_what_is_whole(tmp_path: Path) -> None:
    interrupted(tmp_path, OnnxFileError("a shard is cut"))
    assert (tmp_path / "left" / "m.onnx.data").stat().st_size > 2 * 4 * FLOATS


def test_every_byte_is_told(tmp_path: Path) -> None:
    interrupted(tmp_path)
    told: list[int] = []
    write_files(
        graph([]), tmp_path / "out", "m.onnx", "compact", told=told.append,
        unfinished=Unfinished(tmp_path / "left", "key"),
    )  # fmt: skip
    assert sum(told) == COUNT * FLOATS * 4
    assert len(told) >= COUNT
