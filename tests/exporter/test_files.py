"""Files and folders: written whole, scratch ones that never stay, disks that are full."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exporter.errors import ExportError, UsageError
from exporter.files import (
    refuse_overwriting,
    scratch_folder,
    sha256_files,
    staged_directory,
    telling_full_disk,
    write_private,
    write_text,
)
from graph_passes.files import hashing
from tests.raising import raises
from tests.reading import names_in


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("first", "then", "folder"),
    [(write_text, write_text, "deep"), (write_private, write_text, ".depthcut/deep")],
)
def test_a_written_file_replaces_and_leaves_nothing_beside(
    tmp_path: Path, first: Callable[..., None], then: Callable[..., None], folder: str
) -> None:
    path = tmp_path / folder / "report.json"
    first(path, "old")
    then(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert _names(path.parent) == ["report.json"]


def test_written_files_follow_the_umask_and_replace_no_folder(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.json", "{}")
        with staged_directory(tmp_path / "b"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750
    (tmp_path / "report.json").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "report.json", "{}")
    assert error.value.filename == str(tmp_path / "report.json")
    assert _names(tmp_path) == ["a.json", "b", "report.json"]


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

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashing, "_piece_digest", fails)
    with pytest.raises(OSError, match="Errno 5"):
        sha256_files([tmp_path / "large"], tmp_path)


_HOLDING = """
import sys
from exporter.files import scratch_folder
with scratch_folder("held") as folder:
    (folder / "file").write_text("content")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
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


def test_what_a_living_process_has_stays(temporary: Path) -> None:
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


@pytest.mark.parametrize("root_is", ["open to others", "another's", "a file"])
def test_a_root_that_is_not_ours_alone_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, root_is: str
) -> None:
    if root_is == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    root = temporary / f"depthcut-{os.geteuid()}"
    if root_is == "a file":
        root.write_text("a user's own")
    else:
        root.mkdir()
        root.chmod(0o777 if root_is == "open to others" else 0o700)
    with scratch_folder("one") as folder:
        assert folder.is_dir()
        assert root.is_file() or list(root.iterdir()) == []
        assert private(folder.parent) or root_is == "another's"
        assert folder.parent.parent == temporary
        assert folder.parent != root
    assert list(temporary.iterdir()) == [root]
    assert root.is_dir() or root.read_text() == "a user's own"


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


ROOT = Path(__file__).parents[2]
# Only a child is limited: this process has reports of its own to write.
LIMITED = """
import resource, signal, sys
from pathlib import Path

sys.path.insert(0, {root!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({folder!r})

def limited(write, most_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    try:
        write()
    except OSError as error:
        cause = type(error.__cause__).__name__
        print(error.errno, error.strerror, error.filename, cause, sep="|")
    else:
        print("written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
"""


def told_by(code: str, folder: Path) -> list[str]:
    """The lines that a child prints, which runs ``code`` with ``limited`` and ``folder``."""
    script = LIMITED.format(root=str(ROOT), folder=str(folder)) + code
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_an_onnx_model_that_does_not_fit(tmp_path: Path) -> None:
    code = """
import numpy as np, onnx_ir as ir
from exporter.export.onnx_output import save_onnx
from tests.exporter.export.test_forms import model

big = model(1.0)
big.graph.initializers["w"].const_value = ir.tensor(np.zeros(250_000, np.float32), name="w")
limited(lambda: save_onnx(big, folder), 25_000)
limited(lambda: save_onnx(big, folder), 50)
limited(lambda: save_onnx(big, folder), 2_000_000)
"""
    short, limit, fits = told_by(code, tmp_path)
    # The limit stands for a full disk here, and the system tells it by its own number.
    assert short == limit == f"{errno.EFBIG}|File too large|{tmp_path}|OSError"
    assert fits == "written"
    assert names_in(tmp_path) == ["model.onnx", "model.onnx.*.data"]


@pytest.mark.torch
def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    code = """
from tests.tiny_models import tiny_loaded, tiny_tokenizer
from exporter.models.loading.model_files import save_checkpoint, save_pretrained_files

loaded = tiny_loaded("llama", tiny_tokenizer())
limited(lambda: save_pretrained_files(loaded, folder), 100)
limited(lambda: save_pretrained_files(loaded, folder), 2_000)
limited(lambda: save_checkpoint(loaded, folder), 5_000)
limited(lambda: save_checkpoint(loaded, folder), 2_000_000)
"""
    *result, fits = told_by(code, tmp_path)
    one_line = f"{errno.EFBIG}|File too large|{tmp_path}"
    assert result == [f"{one_line}|{name}" for name in ("OSError", "Exception", "SafetensorError")]
    assert fits == "written"


@pytest.mark.optimum
def test_optimum_on_a_full_disk(tmp_path: Path) -> None:
    code = """
from tests.tiny_models import family_loaded
from exporter.export.forms.portable import export_with_optimum
from exporter.files import scratch_folder

loaded = family_loaded("llama")
size = sum(p.numel() * 4 for p in loaded.model.parameters())
limited(lambda: export_with_optimum(loaded, folder), size // 2)
# The checkpoint fits; optimum's graph does not, which carries its operators as well.
limited(lambda: export_with_optimum(loaded, folder), size + 10_000)
with scratch_folder("test") as place:
    print(place.parent)
"""
    *result, place = told_by(code, tmp_path)
    one_line = f"{errno.EFBIG}|File too large|{place}"
    assert result == [f"{one_line}|OSError", f"{one_line}|ExportError"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), True),
        (PermissionError(errno.EACCES, "Permission denied", "a"), False),
        (RuntimeError("Not a directory (os error 20)"), False),
        (ValueError("9 requested and 3 written"), False),
        (KeyboardInterrupt(), False),
        (MemoryError(), False),
    ],
)
def test_what_a_full_disk_is_wrapped_in_does_not_hide_it(
    tmp_path: Path, error: BaseException, full: bool
) -> None:
    wrapped: BaseException = ExportError("optimum can't export this.") if full else error
    wrapped.__cause__ = error if full else None
    with pytest.raises(OSError if full else type(error)) as caught, telling_full_disk(tmp_path):
        raise wrapped
    if full:
        assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
        assert str(tmp_path) in str(caught.value)
    else:
        assert caught.value is error
