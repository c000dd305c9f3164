"""Folders in the system's temporary directory: nobody else's, and gone whatever ends a process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exporter.files import scratch_folder

_HOLDING = """
import sys
from exporter.files import scratch_folder
with scratch_folder("held") as folder:
    (folder / "file").write_text("content")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary directory, as far as this process and its children see."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@contextmanager
def another_process() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """One that has such a folder open, and the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        try:
            yield child, Path(child.stdout.readline().strip())
        finally:
            child.kill()


def private(path: Path) -> bool:
    return stat.S_IMODE(path.lstat().st_mode) == 0o700


def test_nobody_else_can_enter_it(temporary: Path) -> None:
    before = os.umask(0)
    try:
        with scratch_folder("ray") as folder:
            assert private(folder)
            assert private(folder.parent)
            assert folder.parent.parent == temporary
    finally:
        os.umask(before)


def test_nothing_is_left(temporary: Path) -> None:
    with scratch_folder("one") as first, scratch_folder("one") as second:
        assert first != second
        (first / "below").mkdir()
        (first / "below" / "file").write_text("content")
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_by_a_failure(temporary: Path) -> None:
    with pytest.raises(ValueError, match="within"), scratch_folder("one"):
        raise ValueError("within")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_use(temporary: Path) -> None:
    with another_process() as (child, folder):
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (folder / "file").exists()
        with scratch_folder("next"):
            assert not folder.exists()
    assert list(temporary.iterdir()) == []


def test_what_a_living_process_has_stays() -> None:
    with another_process() as (child, folder):
        with scratch_folder("next"):
            pass
        assert (folder / "file").read_text() == "content"
        assert child.stdin
        child.stdin.close()
        assert child.wait() == 0
        assert not folder.exists()


def test_a_root_that_is_a_link_is_not_used(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    root = temporary / f"depthcut-{os.geteuid()}"
    root.symlink_to(elsewhere)
    with scratch_folder("one") as folder:
        assert list(elsewhere.iterdir()) == []
        assert private(folder.parent)
        assert folder.parent.name != root.name
    assert root.is_symlink()
    assert sorted(temporary.iterdir()) == sorted([elsewhere, root])


def test_a_root_that_others_can_enter_is_not_used(temporary: Path) -> None:
    root = temporary / f"depthcut-{os.geteuid()}"
    root.mkdir()
    root.chmod(0o777)
    with scratch_folder("one") as folder:
        assert list(root.iterdir()) == []
        assert private(folder.parent)
    assert list(temporary.iterdir()) == [root]


def test_a_root_of_another_user_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    root = temporary / f"depthcut-{os.geteuid()}"
    root.mkdir(mode=0o700)
    with scratch_folder("one") as folder:
        assert list(root.iterdir()) == []
        assert folder.parent.parent == temporary
        assert folder.parent != root
    assert list(temporary.iterdir()) == [root]


def test_a_file_of_the_root_s_name_is_left_alone(temporary: Path) -> None:
    root = temporary / f"depthcut-{os.geteuid()}"
    root.write_text("a user's own")
    with scratch_folder("one") as folder:
        assert folder.is_dir()
    assert root.read_text() == "a user's own"


def test_a_link_in_the_place_of_a_rest_is_not_followed(temporary: Path) -> None:
    kept = temporary / "kept"
    kept.mkdir()
    (kept / "file").write_text("content")
    root = temporary / f"depthcut-{os.geteuid()}"
    root.mkdir(mode=0o700)
    (root / "one-00000000.lock").touch()
    (root / "one-00000000").symlink_to(kept)
    with scratch_folder("next"):
        pass
    assert (kept / "file").read_text() == "content"


def test_a_path_that_must_be_short_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with scratch_folder("ray") as folder:
        assert folder.is_relative_to(long)
    with scratch_folder("ray", longest=43) as folder:
        assert len(os.fsencode(folder)) <= 43
        assert private(folder.parent)


def test_many_at_once_disturb_none(temporary: Path) -> None:
    code = (
        "from exporter.files import scratch_folder\n"
        "for _ in range(40):\n"
        "    with scratch_folder('one') as folder:\n"
        "        (folder / 'file').write_text('content')\n"
        "        assert (folder / 'file').read_text() == 'content'\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [child.wait() for child in running] == [0, 0, 0, 0]
    assert list(temporary.iterdir()) == []
