"""A checkpoint that is not whole is refused by its headers, with the shard that is at fault."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from exporter.errors import DepthcutError, ModelSourceError, UnsafeInputError
from exporter.models.loading.checkpoint_shards import CheckpointShards
from tests.raising import raises

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros((0, 4), np.float32),
    "c": np.arange(5, dtype=np.float16),
}
FIRST, SECOND = "model-1.safetensors", "model-2.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({name: TENSORS[name] for name in "ab"}, tmp_path / FIRST)
    save_file({"c": TENSORS["c"]}, tmp_path / SECOND)
    _write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    return tmp_path


def _write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def _refused(folder: Path, code: str, *named: object) -> None:
    with raises(DepthcutError, code, *named) as caught:
        CheckpointShards.open(folder)
    assert isinstance(caught.value, ModelSourceError | UnsafeInputError)


def test_what_the_shards_hold(folder: Path) -> None:
    shards = CheckpointShards.open(folder)
    assert {name: entry.shape for name, entry in shards.entries.items()} == {
        name: tensor.shape for name, tensor in TENSORS.items()
    }
    assert shards.entries["c"].file == folder / SECOND
    assert shards.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert shards.bytes_read == 0
    save_file({"a": TENSORS["a"]}, folder / "model.safetensors")
    assert list(CheckpointShards.open(folder).entries) == ["a"]


@pytest.mark.torch
def test_tensors_are_read_into_aligned_memory_of_their_own(folder: Path) -> None:
    shards = CheckpointShards.open(folder)
    for name, expected in TENSORS.items():
        tensor = shards.read(name)
        assert np.array_equal(tensor.numpy(), expected)
        assert tensor.dtype == shards.entries[name].torch_dtype
        assert tensor.data_ptr() % 64 == 0
        tensor.zero_()
    assert np.array_equal(shards.read("a").numpy(), TENSORS["a"])
    assert shards.bytes_read == shards.nbytes + TENSORS["a"].nbytes


@pytest.mark.torch
def test_reading_ends_between_pieces_once_it_is_told_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AfterOne(threading.Event):
        calls = 0

        def is_set(self) -> bool:
            self.calls += 1
            return self.calls > 1

    monkeypatch.setattr("exporter.models.loading.checkpoint_shards._PIECE_BYTES", 4)
    shards = CheckpointShards.open(folder)
    with pytest.raises(CancelledError):
        shards.read("a", AfterOne())
    assert shards.bytes_read == 0
    assert np.array_equal(shards.read("a", threading.Event()).numpy(), TENSORS["a"])


@pytest.mark.torch
def test_a_shard_that_shrinks_while_it_is_read(folder: Path) -> None:
    shards = CheckpointShards.open(folder)
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:-4])
    with raises(ModelSourceError, "unreadable", folder / FIRST, "a"):
        shards.read("a")
    path.unlink()
    with raises(ModelSourceError, "unreadable", folder / FIRST):
        shards.read("a")
    assert shards.bytes_read == 0
    assert np.array_equal(shards.read("c").numpy(), TENSORS["c"])


@pytest.mark.torch
def test_a_tensor_that_is_larger_than_the_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = CheckpointShards.open(folder)
    free = TENSORS["a"].nbytes - 1
    monkeypatch.setattr("exporter.models.loading.checkpoint_shards.available_bytes", lambda: free)
    with raises(ModelSourceError, "too-little-memory", folder / FIRST, "a"):
        shards.read("a")
    assert np.array_equal(shards.read("c").numpy(), TENSORS["c"])


def test_tensors_that_hold_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.models.loading.checkpoint_shards._PIECE_BYTES", 8)
    values = TENSORS["a"]
    other = values.copy()
    other[-1, -1] = 0
    save_file({"c": TENSORS["c"], "x": values, "y": other}, folder / SECOND)
    shards = CheckpointShards.open(folder)
    assert shards.same("a", "x")
    assert not shards.same("a", "y")
    assert not shards.same("a", "c")
    assert shards.bytes_read == 0


@pytest.mark.parametrize(
    ("places", "code", "named"),
    [
        ({"a": FIRST, "c": FIRST}, "unreadable", ("c", FIRST)),
        ({"a": SECOND, "b": FIRST, "c": SECOND}, "unreadable", ("a", SECOND)),
        ({"a": FIRST, "x": FIRST}, "unreadable", ("x", FIRST)),
        ({"a": f"../{FIRST}"}, "outside-folder", (f"../{FIRST}",)),
        ({"a": "gone"}, "unreadable", ()),
        ([1], "unreadable", ()),
        ({"a": 1}, "unreadable", ("weight_map",)),
        ("[" * 99_999, "too-many-values", ()),
        (None, "no-model", ("model.safetensors",)),
    ],
)
def test_an_index_that_disagrees(
    folder: Path, places: Any, code: str, named: tuple[object, ...]
) -> None:
    _write_index(folder, places)
    if isinstance(places, str):
        (folder / INDEX).write_text(places)
    elif places is None:
        (folder / INDEX).unlink()
    _refused(folder, code, INDEX, *named)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    save_file({"c": TENSORS["c"], "a": TENSORS["a"]}, folder / SECOND)
    _refused(folder, "unreadable", SECOND, "a", FIRST)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: b"\xff" * len(raw),
        lambda raw: raw[:8] + b"[" + raw[9:],
        lambda raw: raw.replace(b"[5]", b"[6]"),
        lambda raw: raw.replace(b"[0,10]", b"[2,12]"),
        lambda raw: raw.replace(b"[5]", b"5.0"),
        lambda raw: raw.replace(b'F16","shape":[5]', b'X","shape":[-5] '),
        lambda raw: raw.replace(b'F16","', b'X"  ,"').replace(b"[0,10]", b"[10,0]"),
        lambda raw: (99_999).to_bytes(8, "little") + b"[" * 99_999,
    ],
)
def test_a_shard_that_is_not_whole(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / SECOND
    raw = path.read_bytes()
    path.write_bytes(damage(raw))
    assert path.read_bytes() != raw
    _refused(folder, "unreadable", path)


def test_a_shard_that_may_not_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == SECOND:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    _refused(folder, "unreadable", SECOND)
