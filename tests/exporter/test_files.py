from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.errors import UsageError
from exporter.files import (
    refuse_overwriting,
    sha256_file,
    sha256_files,
    staged_directory,
    write_private,
    write_text,
    write_texts,
)
from graph_passes.files import hashing, record
from tests.raising import raises


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
    with pytest.raises(OSError, match="Errno 28"):
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


def test_a_folder_is_not_overwritten_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "report.json", "{}")
    assert error.value.filename == str(tmp_path / "report.json")
    assert _names(tmp_path) == ["report.json"]


def test_texts_appear_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [tmp_path / name for name in ("one.json", "two.md")]
    write_texts(dict.fromkeys(names, "old"))
    put, done = record.put, []

    def fails(staged: Path, final: Path) -> None:
        if done:
            raise KeyboardInterrupt
        put(staged, final)
        done.append(final)

    monkeypatch.setattr(record, "put", fails)
    with pytest.raises(KeyboardInterrupt):
        write_texts(dict.fromkeys(names, "new"))
    assert done == names[:1]
    assert [path.read_text() for path in names] == ["old", "old"]
    monkeypatch.setattr(record, "put", put)
    write_texts(dict.fromkeys(names, "new"))
    assert [path.read_text() for path in names] == ["new", "new"]
    assert _names(tmp_path) == ["one.json", "two.md"]


@pytest.mark.parametrize("write", [write_text, write_private])
def test_nothing_is_written_through_a_link(tmp_path: Path, write: Callable[..., None]) -> None:
    """Neither the file nor what it is made in first is a link that is followed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("told.json", "told.json.part"):
        (tmp_path / name).symlink_to(victim)
    if write is write_private:
        with pytest.raises(OSError, match="Errno 40"):
            write(tmp_path / "told.json", "new")
    else:
        write(tmp_path / "told.json", "new")
        assert (tmp_path / "told.json").read_text() == "new"
        assert not (tmp_path / "told.json").is_symlink()
    assert victim.read_text() == "precious"


def test_private_files_replace_and_leave_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / ".depthcut" / "deep" / "told.json"
    write_private(path, "old")
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert _names(path.parent) == ["told.json"]


def test_a_folder_that_is_named_by_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    real = tmp_path / "disk" / "baseline"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    with staged_directory(tmp_path / "link") as stage:
        (stage / "new").touch()
    assert _names(real) == ["new"]
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path) == ["disk", "link"]


def test_no_result_has_the_name_of_our_own_folders(tmp_path: Path) -> None:
    """A file of that name would keep every later command from the folder."""
    with pytest.raises(UsageError):
        write_text(tmp_path / ".depthcut", "text")
    with pytest.raises(UsageError), staged_directory(tmp_path / ".depthcut"):
        pass
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "depthcut", "text")


def test_no_result_takes_the_place_of_an_input(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    text = tmp_path / "text.txt"
    text.touch()
    (tmp_path / "link.txt").symlink_to(text)
    for output in (model / "config.json", text, tmp_path / "link.txt"):
        with raises(UsageError, "overwrites-input"):
            refuse_overwriting(output, [model, text])
    refuse_overwriting(model / "importance.json", [model, text])
    refuse_overwriting(tmp_path / "model2.json", [model, text, tmp_path / "hf-id"])


def test_large_files_are_hashed_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(hashing, "_READ_BYTES", 300)
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

    monkeypatch.setattr(hashing, "_PIECE_BYTES", 10)
    monkeypatch.setattr(hashing, "_piece_digest", fails)
    (tmp_path / "large").write_bytes(b"x" * 100)
    with pytest.raises(OSError, match="Errno 5"):
        sha256_files([tmp_path / "large"], tmp_path)
