"""What strace saw of a try: files opened and changed, programs started, connections made."""

# Paths are looked at as the system has them; a Path drops what is odd.
# ruff: noqa: PTH118
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.hostile.watch import Rules

_CALLS = (
    "open,openat,openat2,creat,unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,"
    "rmdir,mknod,mknodat,truncate,chmod,fchmodat,chown,fchownat,lchown,execve,execveat,connect,sendto,sendmsg,sendmmsg"
)  # fmt: skip
_PATH = re.compile(r'(?:(AT_FDCWD|-?\d+)(?:<((?:[^<>"\\]|\\.)*)>)?, )?"((?:[^"\\]|\\.)*)"')


def command(log: Path) -> list[str]:
    """What a process is started with so that its calls are written to a file."""
    strace = shutil.which("strace")
    if strace is None:
        raise FileNotFoundError("strace is not installed")
    return [strace, "-f", "--seccomp-bpf", "-y", "-s", "4096", "-qq", "-e", f"trace={_CALLS}",
    "-e", "signal=none", "-o", str(log)]  # fmt: skip


def by_try(log: Path, pids: Sequence[int]) -> list[list[str]]:
    """The lines of each try, which begin with the first of its process; an interrupted call is one.

    Numbers of processes begin anew when all were used, so the order counts. The first line is that
    of the job itself, which prepares and clears up.
    """
    lines_of: list[list[str]] = [[] for _ in pids]
    job, current = 0, -1
    begun: dict[int, str] = {}
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            pid, _, rest = line.rstrip("\n").partition(" ")
            rest = rest.strip()
            job = job or int(pid)
            if not pid.isdigit() or int(pid) == job:
                continue
            if current + 1 < len(pids) and int(pid) == pids[current + 1]:
                current += 1
            if rest.endswith("<unfinished ...>"):
                begun[int(pid)] = rest.removesuffix("<unfinished ...>").rstrip()
                continue
            if rest.startswith("<... "):
                rest = begun.pop(int(pid), "") + rest.partition(" resumed>")[2]
            if current >= 0:
                lines_of[current].append(rest)
    return lines_of


def faults(lines: Iterable[str], rules: Rules) -> Iterator[str]:
    """What was done that may not be done."""
    for line in lines:
        name, _, rest = line.partition("(")
        failed = re.search(r"\) += -1 ", rest) is not None
        if name in ("connect", "sendto", "sendmsg", "sendmmsg"):
            if "AF_INET" in rest or ("NETLINK" in rest and name == "connect"):
                yield f"request: {line[:200]}"
        elif name in ("execve", "execveat"):
            program = _paths(rest, rules.folder)[:1]
            if not failed and not all(map(rules.may_start, program)):
                yield f"program: {line[:200]}"
        elif name.startswith(("open", "creat")):
            yield from _opened(line, rest, failed, rules)
        elif not failed:
            for path in _paths(rest, rules.folder)[name.startswith(("link", "symlink")) :]:
                if not rules.may_write(path):
                    yield f"outside: {name} {path}"


def _opened(line: str, rest: str, failed: bool, rules: Rules) -> Iterator[str]:
    real = re.search(r"\) += \d+<(.*)>$", rest)
    path = _text(real[1]) if real else (_paths(rest, rules.folder) or [""])[0]
    path = path.removesuffix(" (deleted)").removesuffix("(deleted)")
    if not path.startswith("/") or '"/proc/self/environ"' in rest:  # PyTorch's libraries do that
        return
    writes = "O_WRONLY" in rest or "O_RDWR" in rest or "O_CREAT" in rest
    if failed:
        if not rules.may_read(os.path.normpath(path)):
            yield f"outside: tried to open {path}"
    elif not rules.may_read(path):
        yield f"outside: opened {path}"
    elif writes and not rules.may_write(path) and "O_TMPFILE" not in rest:
        yield f"outside: opened to write {path}"


def _paths(rest: str, here: str) -> list[str]:
    """The paths that a call names, from the root on."""
    texts = []
    for _, folder, name in _PATH.findall(rest):
        path = _text(name)
        if not path.startswith("/"):
            path = os.path.join(_text(folder) if folder else here, path)
        texts.append(os.path.normpath(path))
    return texts


def _text(quoted: str) -> str:
    if "\\" not in quoted:
        return quoted
    return (quoted.encode("latin-1", "replace") .decode("unicode_escape") .encode("latin-1",
    "replace") .decode("utf-8", "replace"))  # fmt: skip
