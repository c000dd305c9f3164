"""Stages that several output folders have in common: made once, linked, never trusted unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.pipeline import quantizing as shared
from exporter.pipeline.quantizing import Finished, SharedStages, take_or_make

KEY = {"model": "m", "dtype": "float32"}


class Maker:
    """Makes a stage of a folder and a file, and counts."""

    def __init__(self, work: Path, text: str = "weights") -> None:
        self.work, self.text, self.calls = work, text, 0

    def __call__(self) -> Finished:
        self.calls += 1
        (self.work / "baseline" / "sub").mkdir(parents=True, exist_ok=True)
        files = [self.work / "baseline" / "sub" / "w.bin", self.work / "note.json"]
        for file in files:
            file.write_text(self.text)
        return files, [self.text]


def walk(folder: Path, root: Path, key: Any = KEY, text: str = "weights") -> tuple[Maker, Path]:
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    make = Maker(work, text)
    (files, notes), made = take_or_make(root, "export", key, work, make)
    assert made == bool(make.calls)
    assert {path.read_text() for path in files} == {notes[0]}
    return make, work


def test_a_stage_is_made_once_and_its_files_are_the_same_ones(tmp_path: Path) -> None:
    first, one = walk(tmp_path / "a", tmp_path / ".depthcut" / "shared")
    second, other = walk(tmp_path / "b", tmp_path / ".depthcut" / "shared")
    assert (first.calls, second.calls) == (1, 0)
    for name in ("baseline/sub/w.bin", "note.json"):
        assert (one / name).samefile(other / name)


def test_another_key_is_another_stage(tmp_path: Path) -> None:
    walk(tmp_path / "a", tmp_path / ".depthcut" / "shared")
    other, _ = walk(
        tmp_path / "b", tmp_path / ".depthcut" / "shared", {**KEY, "dtype": "float16"}, "halves"
    )
    assert other.calls == 1


@pytest.mark.parametrize("damage", ["file", "entry", "gone"])
def test_what_was_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    root = tmp_path / ".depthcut" / "shared"
    _, work = walk(tmp_path / "a", root)
    (place,) = root.glob("export-*")
    if damage == "file":
        (place / "files" / "note.json").unlink()
        (place / "files" / "note.json").write_text("other")
    elif damage == "entry":
        (place / "entry.json").write_text("{")
    else:
        (place / "files" / "note.json").unlink()
    again, _ = walk(tmp_path / "b", root)
    assert again.calls == 1
    assert walk(tmp_path / "c", root)[0].calls == 0
    assert (work / "note.json").read_text() == "weights"


def test_without_hard_links_the_files_are_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(shared.os, "link", refuse)
    _, one = walk(tmp_path / "a", tmp_path / ".depthcut" / "shared")
    again, other = walk(tmp_path / "b", tmp_path / ".depthcut" / "shared")
    assert again.calls == 0
    assert not (one / "note.json").samefile(other / "note.json")


def test_only_what_no_folder_holds_any_more_is_removed(tmp_path: Path) -> None:
    root = tmp_path / ".depthcut" / "shared"
    walk(tmp_path / "a", root)
    _, work = walk(tmp_path / "b", root, {"model": "gone"}, "other")
    for path in work.rglob("*"):
        if path.is_file():
            path.unlink()
    SharedStages(root).tidy()
    assert len(list(root.glob("export-*"))) == 1
    assert walk(tmp_path / "c", root)[0].calls == 0
    assert walk(tmp_path / "d", root, {"model": "gone"}, "other")[0].calls == 1


def test_a_stage_that_fails_is_nobody_s(tmp_path: Path) -> None:
    def fail() -> Finished:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        take_or_make(tmp_path / ".depthcut" / "shared", "export", KEY, tmp_path, fail)
    assert walk(tmp_path / "a", tmp_path / ".depthcut" / "shared")[0].calls == 1
