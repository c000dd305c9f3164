"""What can go wrong with the folder of a result, or with the clock, while a command runs."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kills.bench import Ended, Task, done
from tests.kills.killing import Beginning, Killing, Outcome
from tests.kills.scenarios import SCENARIOS, Scenario
from tests.kills.ticks import Kill
from tests.kills.trees import shown, tree

_A_YEAR_S = 365 * 86400
_PAGE_BYTES = 4096
_HARD_LINKS = ("small-disk", True)


def full_disk(killing: Killing, command: str) -> Outcome:
    """There is room for half of the largest new file."""

    def run(beginning: Beginning) -> Ended:
        most = max(max(beginning.result.sizes) // 2, 1024)
        return killing.bench.run(_limited(SCENARIOS[command].new, most))

    return _refused(killing, command, run)


def _limited(task: Task, most_bytes: int) -> Callable[[], object]:
    """A command whose files may have so many bytes each, as where a quota is met."""

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        return done(task)

    return work


def small_disk(killing: Killing, command: str) -> Outcome:
    """The old result and half of the new one fill the disk."""

    def run(beginning: Beginning) -> Ended:
        out, kept = killing.bench.work / "out", killing.bench.root / "kept"
        room = sum(-(-size // _PAGE_BYTES) for size in beginning.result.sizes) // 2
        with _own_disk(out):
            disk = os.statvfs(out)
            size = (disk.f_blocks - disk.f_bfree) * disk.f_frsize + max(room, 1) * _PAGE_BYTES
            _remount(out, f"size={size}")
            ended = killing.bench.run(SCENARIOS[command].new)
            _copy(out, kept)
        _copy(kept, out)
        return ended

    return _refused(killing, command, run)


def read_only(killing: Killing, command: str) -> Outcome:
    """Nothing can be written where the result stands."""

    def run(beginning: Beginning) -> Ended:
        out = killing.bench.work / "out"
        with _own_disk(out):
            _remount(out, "ro")
            return killing.bench.run(SCENARIOS[command].new)

    return _refused(killing, command, run)


def removed_meanwhile(killing: Killing, command: str) -> Outcome:
    """Somebody removes the whole folder while the command is half done."""
    outcome, beginning = _begun(killing, command, "removed meanwhile")
    bench, out = killing.bench, killing.bench.work / "out"
    halfway = Kill(max(1, beginning.run.count // 2))
    ended = bench.run(SCENARIOS[command].new, halfway, instead=lambda: shutil.rmtree(out))
    outcome.blame("different", _unclear(ended, SCENARIOS[command]))
    again = bench.run(SCENARIOS[command].new)
    if again.code:
        outcome.blame("different", [f"again: exit code {again.code}: {again.said[-400:]}"])
    start, new = beginning.start, shown(beginning.result.trees[0])
    now = {name for name in shown(tree(bench.work)) if not name.endswith("/")}
    written = {name for name, content in new.items() if start.get(name) != content}
    outcome.blame("lost", sorted(written - now))
    outcome.blame("stale", sorted(now - new.keys()))
    return outcome


def clock_set_back(killing: Killing, command: str) -> Outcome:
    """All that stands there is a year younger than now."""
    outcome, beginning = _begun(killing, command, "clock set back")
    for path in (killing.bench.work / "out").rglob("*"):
        found = path.stat(follow_symlinks=False)
        later = (found.st_atime + _A_YEAR_S, found.st_mtime + _A_YEAR_S)
        os.utime(path, later, follow_symlinks=False)
    killing.again(command, beginning, outcome)
    return outcome


TROUBLES: dict[str, Callable[[Killing, str], Outcome]] = {
    "full-disk": full_disk,
    "small-disk": small_disk,
    "read-only": read_only,
    "removed-meanwhile": removed_meanwhile,
    "clock-set-back": clock_set_back,
}
WITH_MOUNTS = ("small-disk", "read-only")


def troubles(command: str) -> list[str]:
    """Those that a command can be put into here."""
    # A sweep's cells share files, so that half of their sizes is room enough.
    shares = SCENARIOS[command].tells_in_a_table
    lacking = [] if can_mount() else [*WITH_MOUNTS]
    return [name for name in TROUBLES if name not in lacking and (name, shares) != _HARD_LINKS]


@functools.cache
def can_mount() -> bool:
    """Whether this process may give a folder a file system of its own."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"mounted-{os.getpid()}")
    folder.mkdir()
    try:
        with _own_disk(folder):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False
    finally:
        folder.rmdir()


def _refused(killing: Killing, command: str, run: Callable[[Beginning], Ended]) -> Outcome:
    """A command that can't end well says so in a line, and leaves all as it was."""
    outcome, beginning = _begun(killing, command, "refused")
    ended = run(beginning)
    if not ended.code:
        outcome.blame("different", ["it ended well"])
    outcome.blame("different", _unclear(ended, SCENARIOS[command]))
    if SCENARIOS[command].tells_in_a_table:
        killing.again(command, beginning, outcome)
        return outcome
    killing.check(command, beginning, outcome).whole()
    now = shown(tree(killing.bench.work))
    if not SCENARIOS[command].apart and now != shown(beginning.start):
        outcome.blame("lost", ["the old result"])
    killing.again(command, beginning, outcome)
    return outcome


def _begun(killing: Killing, command: str, what: str) -> tuple[Outcome, Beginning]:
    beginning = killing.beginning(command, 1)
    killing.bench.reset(beginning.template)
    return Outcome(command, 0, story=[what]), beginning


def _unclear(ended: Ended, scenario: Scenario) -> Iterator[str]:
    told = [line for line in ended.said.splitlines() if line.startswith("depthcut: ")]
    clear = not ended.code or len(told) == 1 or scenario.tells_in_a_table
    if ended.code not in (0, 1, 2) or "Traceback" in ended.said or not clear:
        yield f"exit code {ended.code} without one clear line: {ended.said[-600:]}"


@contextlib.contextmanager
def _own_disk(folder: Path) -> Iterator[None]:
    """Puts a folder's content onto a file system of its own for a while."""
    aside = folder.with_name(f"{folder.name}-aside")
    _copy(folder, aside)
    try:
        call = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        subprocess.run(call, check=True, capture_output=True)
        try:
            _copy(aside, folder)
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        shutil.rmtree(aside)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def _copy(source: Path, target: Path) -> None:
    """Makes a folder's content that of another one."""
    for path in target.iterdir() if target.exists() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
