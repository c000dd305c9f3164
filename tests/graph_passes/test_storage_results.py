"""What a result's weights are named, and what becomes of an earlier result."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from test_storage import PLAN, _all_weights_external, _rewrite, saved
from written_files import all_data_of, data_of

from graph_passes import OnnxFileError, prune_graph
from graph_passes.files import record, storage
from graph_passes.files.exchange import put
from graph_passes.files.hashing import sha256_file
from graph_passes.files.storage import data_files, load_model, save_model

__all__ = ["_all_weights_external", "saved"]  # fixtures


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


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_the_earlier_result(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "out" / "pruned.onnx"
    save_model(prune_graph(load_model(saved), PLAN)[0], target)
    before = {p.name: p.read_bytes() for p in target.parent.iterdir()}
    calls = 0

    def fails(*_: Any, **__: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise error
        return os.pwrite(_[1], os.pread(_[0], _[2], _[3]), os.lseek(_[1], 0, os.SEEK_CUR))

    monkeypatch.setattr(os, "copy_file_range", fails, raising=False)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OnnxFileError
    with pytest.raises(expected):
        save_model(prune_graph(load_model(saved), PLAN[:1])[0], target)
    assert {p.name: p.read_bytes() for p in target.parent.iterdir()} == before


@pytest.mark.parametrize("failing_move", [0, 1])
def test_an_interrupted_move_puts_the_earlier_result_back(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_move: int
) -> None:
    target = tmp_path / "out" / "pruned.onnx"
    save_model(prune_graph(load_model(saved), PLAN)[0], target)
    before = {p.name: p.read_bytes() for p in target.parent.iterdir()}
    moves = 0

    def interrupted(staged: Path, final: Path) -> None:
        nonlocal moves
        if moves == failing_move:
            raise KeyboardInterrupt
        moves += 1
        put(staged, final)

    monkeypatch.setattr(record, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(prune_graph(load_model(saved), PLAN[:1])[0], target)
    assert {p.name: p.read_bytes() for p in target.parent.iterdir()} == before
