"""Hears what a process opens, changes, starts and asks of the network, and notes what is wrong."""

# Paths are looked at as the system has them; a Path drops what is odd.
# ruff: noqa: PTH114, PTH115, PTH117, PTH118, PTH119, PTH100
from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.place import PWNED, Place

REPOSITORY = Path(__file__).parents[2]
NEVER_READ = ("/etc/hostname", "/etc/shadow", "/proc/self/environ", "/dev/zero", "/dev/full")
"""What hostile models name, and nothing else opens."""
_LIBRARIES = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", "/dev", "/opt",
"/root/.pyenv",)  # fmt: skip
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr",
            "socket.sendto", "socket.sendmsg", "socket.bind", "urllib.Request")  # fmt: skip
_PROGRAMS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty")
_ONE_PATH = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2, "os.chown": 3,
             "os.truncate": 0, "os.utime": 3, "shutil.rmtree": 1, "os.mkfifo": 0,
             "os.mknod": 0}  # fmt: skip
"""Changes of one name, and which argument is the folder's handle, if any."""
_ASKED = ("uname", "lscpu", "ldconfig", "nvidia-smi", "gcc", "cc", "c++", "g++")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Rules:
    """What a command may do in a place."""

    def __init__(self, place: Place, model: Path, *, own_code: bool) -> None:
        self._place, self._own_code = place, own_code
        self._root = os.path.realpath(place.root)
        self._model = os.path.realpath(model)
        self.folder = os.path.realpath(place.work)
        ours = [place.root / name for name in ("out", "err", "told", "cache")]
        self._writes = [os.path.realpath(path) for path in (place.out, place.temporary, *ours)]
        self._modules = os.path.realpath(place.home / ".cache" / "huggingface" / "modules")
        self._code = [self._modules, os.path.realpath(place.beside / PWNED)] if own_code else []
        self._writes += self._code
        self._closed = [os.path.realpath(p) for p in (place.beside, place.home, place.victim)]
        prefixes = {sys.prefix, sys.base_prefix, str(REPOSITORY), *_LIBRARIES}
        self._libraries = [p for prefix in prefixes for p in {prefix, os.path.realpath(prefix)}]

    def may_read(self, path: str) -> bool:
        """Whether a file may be opened; ``path`` has no links in it."""
        if path in NEVER_READ or path.endswith("/environ"):
            return False
        if _below(path, self._code):
            return True
        if _below(path, [self._root]):
            return not _below(path, self._closed)
        return _below(path, self._libraries)

    def may_write(self, path: str) -> bool:
        """Whether a file or folder may be made, changed or removed."""
        return (
            path in ("/dev/null", "/dev/tty")
            or _below(path, self._writes)
            or path.startswith("/dev/shm/")
        )

    def may_start(self, program: str) -> bool:
        """Whether a program may be started: ours, or one that tells of the machine."""
        name = os.path.basename(program)
        ours = os.path.realpath(program) == os.path.realpath(sys.executable)
        elsewhere = "/" not in program or not _below(os.path.realpath(program), [self._root])
        return ours or (name in _ASKED and elsewhere)

    def is_strangers_code(self, path: str) -> bool:
        """Whether code from there is a model's, and may not run."""
        if self._own_code and _below(path, [self._modules, self._model]):
            return False
        return _below(path, [self._root])


def _below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


class Watch:
    """Writes each thing that is wrong to a file, a line each, when it is about to happen."""

    def __init__(self, rules: Rules, tell: Callable[[str], None]) -> None:
        self._rules, self._tell = rules, tell
        self._inside = False

    def begin(self) -> None:
        """From now on, for as long as the process lives."""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _NETWORK:
            if not (event.startswith("socket") and getattr(arguments[0], "family", None) == 1):
                self._tell(f"request: {event} {arguments[-1]!r:.80}")
                raise ConnectionError("the network is off")
        elif not self._inside:
            self._inside = True
            with contextlib.suppress(TypeError, ValueError, OSError):
                self._look(event, arguments)
            self._inside = False

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._opened(*arguments)
        elif event in _ONE_PATH:
            place = _ONE_PATH[event]
            handle = arguments[place] if place and place < len(arguments) else -1
            self._written(event, arguments[0], handle)
        elif event in ("os.rename", "os.link", "os.symlink"):
            handles = arguments[2:] if event != "os.symlink" else (-1, arguments[2])
            self._written(event, arguments[1], handles[1])
            if event == "os.rename":
                self._written(event, arguments[0], handles[0])
        elif event in _PROGRAMS:
            program = os.fsdecode(arguments[0] or "") if arguments else ""
            if event != "subprocess.Popen" or not self._rules.may_start(program):
                self._tell(f"program: {event} {str(arguments[:2])[:200]}")
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if name.startswith("/") and self._rules.is_strangers_code(os.path.realpath(name)):
                self._tell(f"code: {name}")
        elif event == "pickle.find_class":
            self._tell(f"code: pickle {arguments[0]}.{arguments[1]}")
        elif event == "ctypes.dlopen":
            name = os.fspath(arguments[0] or "")
            if "/" in name and self._rules.is_strangers_code(os.path.realpath(name)):
                self._tell(f"code: library {name}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        if flags & os.O_NOFOLLOW and os.path.islink(path):
            return  # it is going to fail
        if not self._rules.may_read(real):
            self._tell(f"outside: open {real}")
        elif (
            flags & _WRITES and not self._rules.may_write(real) and os.path.isabs(os.fsdecode(path))
        ):
            self._tell(f"outside: write {real}")

    def _written(self, event: str, path: Any, handle: Any) -> None:
        """A change of a name: the last part may be a link, which is changed itself."""
        if isinstance(path, int):
            return
        name = os.fsdecode(path)
        if isinstance(handle, int) and handle >= 0 and not os.path.isabs(name):
            name = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), name)
        head, tail = os.path.split(os.path.abspath(name))
        real = os.path.join(os.path.realpath(head), tail)
        if os.path.lexists(real) == (event == "os.mkdir"):
            return  # nothing to remove, or to make
        if not self._rules.may_write(real):
            self._tell(f"outside: {event} {real}")
