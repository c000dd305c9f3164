from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from exporter import files
from exporter.errors import UsageError
from exporter.files import (
    refuse_overwriting,
    sha256_file,
    sha256_files,
    staged_directory,
    swap,
    write_text,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_text(path, "old")
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert _names(path.parent) == ["report.json"]


def test_a_failed_write_keeps_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")

    def disk_full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert _names(tmp_path) == ["report.json"]


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.json", "{}")
        with staged_directory(tmp_path / "b"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "baseline"
    with staged_directory(final) as stage:
        (stage / "model.onnx").write_bytes(b"1")
        assert not final.exists()
    assert _names(final) == ["model.onnx"]
    assert _names(tmp_path) == ["baseline"]


def test_a_staged_folder_replaces_the_older_one_wholly(tmp_path: Path) -> None:
    final = tmp_path / "baseline"
    with staged_directory(final) as stage:
        (stage / "old").touch()
    with staged_directory(final) as stage:
        (stage / "new").touch()
    assert _names(final) == ["new"]
    assert _names(tmp_path) == ["baseline"]


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt])
def test_a_staged_folder_that_fails_leaves_the_older_one(
    tmp_path: Path, end: type[BaseException]
) -> None:
    final = tmp_path / "baseline"
    with staged_directory(final) as stage:
        (stage / "old").touch()

    def interrupted() -> None:
        with staged_directory(final) as stage:
            (stage / "new").touch()
            raise end

    with pytest.raises(end):
        interrupted()
    assert _names(final) == ["old"]
    assert _names(tmp_path) == ["baseline"]


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    both = sha256_files([tmp_path / "a"], tmp_path)
    (tmp_path / "a").replace(tmp_path / "b")
    assert sha256_files([tmp_path / "b"], tmp_path) != both


@pytest.mark.parametrize("moment", [1, 2])
def test_an_interrupt_between_the_renames_puts_the_older_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    calls = 0
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == moment:
            if moment == 1:  # after the older folder was moved aside
                replace(self, target)
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap(tmp_path / "new", tmp_path / "final")
    assert _names(tmp_path / "final") == ["old"]


def test_a_folder_is_not_overwritten_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "report.json", "{}")
    assert error.value.filename == str(tmp_path / "report.json")
    assert _names(tmp_path) == ["report.json"]


def test_no_result_takes_the_place_of_an_input(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    text = tmp_path / "text.txt"
    text.touch()
    (tmp_path / "link.txt").symlink_to(text)
    for output in (model / "config.json", text, tmp_path / "link.txt"):
        with pytest.raises(UsageError, match="inputs are never changed"):
            refuse_overwriting(output, [model, text])
    refuse_overwriting(model / "importance.json", [model, text])
    refuse_overwriting(tmp_path / "model2.json", [model, text, tmp_path / "hf-id"])


def test_large_files_are_hashed_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(files, "_READ_BYTES", 300)
    content = bytes(range(256)) * 20
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "small").write_bytes(content[:1000])
    pieces = [hashlib.sha256(content[i : i + 1000]).digest() for i in range(0, 5120, 1000)]
    large = hashlib.sha256(b"".join(pieces)).hexdigest()
    small = hashlib.sha256(content[:1000]).hexdigest()
    expected = hashlib.sha256(f"large\0{large}\nsmall\0{small}\n".encode()).hexdigest()
    both = [tmp_path / "small", tmp_path / "large"]
    assert sha256_files(both, tmp_path) == expected
    (tmp_path / "large").write_bytes(content[:-1] + b"x")
    assert sha256_files(both, tmp_path) != expected


def test_a_piece_that_can_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "_PIECE_BYTES", 10)
    monkeypatch.setattr(files, "_piece_digest", fails)
    (tmp_path / "large").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="Input/output"):
        sha256_files([tmp_path / "large"], tmp_path)
