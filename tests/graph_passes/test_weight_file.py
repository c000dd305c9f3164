"""Where weights stand in a data file, and how they get there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes.files import weight_file
from graph_passes.files.weight_file import WeightWriter, read_bytes

PAGE = 4096
LARGE = 1 << 20


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
    small = stored(source, 5, 100, "small")
    offsets = written(
        tmp_path, [small, stored(source, at, LARGE), stored(source, at + PAGE, LARGE)]
    )
    assert offsets[0] == 0
    assert [offset % PAGE for offset in offsets[1:]] == [within_page] * 2


def test_small_weights_stand_close_together(source: Path, tmp_path: Path) -> None:
    tensors = [stored(source, 100 * i, 100, str(i)) for i in range(4)]
    assert written(tmp_path, tensors) == [0, 128, 256, 384]


def test_weights_in_memory_are_written_too(source: Path, tmp_path: Path) -> None:
    array = np.frombuffer(noise(LARGE + 1, 1), np.uint8)
    offsets = written(tmp_path, [stored(source, 0, 100), ir.tensor(array, name="m")])
    assert offsets == [0, PAGE]


def test_whole_pages_are_copied_apart_from_the_rest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ranges of whole blocks can be shared between files."""
    result = []
    copy = os.copy_file_range

    def noted(*arguments: Any) -> int:
        result.append((arguments[3], arguments[2]))
        return copy(*arguments)

    monkeypatch.setattr(os, "copy_file_range", noted)
    written(tmp_path, [stored(source, 64, LARGE + 100)])
    assert result == [(64, PAGE - 64), (PAGE, LARGE - PAGE), (LARGE, 164)]


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


@pytest.mark.parametrize("refused", [errno.EXDEV, errno.ENOSYS, errno.EINVAL])
def test_without_the_kernels_help_the_bytes_are_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    calls = []

    def fails(*arguments: Any) -> int:
        calls.append(arguments)
        raise OSError(refused, "no")

    monkeypatch.setattr(os, "copy_file_range", fails)
    monkeypatch.setattr(weight_file, "_PIECE_BYTES", 1000)
    written(tmp_path, [stored(source, 64, LARGE), stored(source, 0, 3000)])
    assert len(calls) == 1


def test_a_file_system_that_knows_no_holes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "lseek", fails)
    written(tmp_path, [stored(source, 64, LARGE)])


def test_a_kernel_that_copies_nothing_is_passed_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    written(tmp_path, [stored(source, 64, LARGE)])


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
