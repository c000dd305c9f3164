"""Counts the file operations of a process and of its children, and kills it at one of them."""

from __future__ import annotations

import functools
import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
"os.truncate", "os.chmod", "os.utime"}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CALLS = ("write", "pwrite", "copy_file_range", "sendfile")
_MOST = 1 << 20
_HEAD = struct.Struct("<QQQQ")  # counted so far, the one to die at, who dies, depth of placing
_ALL = 1 << 62


@dataclass(frozen=True)
class Kill:
    """When and how a process is killed."""

    at: int = 0
    after_s: float = 0.0
    group: bool = True

    def __str__(self) -> str:
        when = f"at operation {self.at}" if self.at else f"after {self.after_s:.3f} s"
        return f"{when}, {'with' if self.group else 'without'} its children"


class Ticks:
    """A count that a process shares with those that it forks."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, _HEAD.size + _MOST)

    def reset(self) -> None:
        """Begins anew."""
        self._shared.seek(0)
        self._shared.write(bytes(_HEAD.size))

    @property
    def count(self) -> int:
        """How many operations there were."""
        return self._numbers()[0]

    @property
    def late(self) -> list[int]:
        """Those while results took their places, and the last few, which tidy up."""
        marks = self._shared[_HEAD.size : _HEAD.size + self.count]
        placing = [number for number, mark in enumerate(marks, start=1) if mark]
        return sorted({*placing, *range(max(1, self.count - 12), self.count + 1)})

    def begin(self, kill: Kill | None) -> None:
        """Counts in this process from now on, which can't be ended."""
        victim = os.getpid() | (_ALL if kill is not None and kill.group else 0)
        _HEAD.pack_into(self._shared, 0, 0, kill.at if kill else 0, victim, 0)
        for name in _CALLS:
            setattr(os, name, self._heard(getattr(os, name)))
        os.fsync = self._heard(lambda _: None)  # slow, and for power cuts, not for kills
        self._watch_placing()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITES and path != os.devnull:
                self.tick()
        elif event in _EVENTS:
            self.tick()

    def _heard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*arguments: Any, **options: Any) -> Any:
            self.tick()
            return call(*arguments, **options)

        return counted

    def _watch_placing(self) -> None:
        from graph_passes.files import exchange, placing

        swap, place = exchange._exchange, placing.place

        def exchanged(one: Path, other: Path) -> None:
            self.tick()
            swap(one, other)
            self.tick()

        def placed(*arguments: Any, **options: Any) -> None:
            self._deeper(1)
            try:
                place(*arguments, **options)
                self.tick()
            finally:
                self._deeper(-1)

        exchange._exchange, placing.place = exchanged, placed

    def _deeper(self, by: int) -> None:
        count, at, victim, depth = self._numbers()
        _HEAD.pack_into(self._shared, 0, count, at, victim, depth + by)

    def _numbers(self) -> tuple[int, int, int, int]:
        return _HEAD.unpack_from(self._shared)

    def tick(self) -> None:
        """One operation is about to happen."""
        count, at, victim, depth = self._numbers()
        count += 1
        _HEAD.pack_into(self._shared, 0, count, at, victim, depth)
        self._shared[_HEAD.size + min(count, _MOST) - 1] = int(depth > 0)
        if count == at:
            pid = victim & ~_ALL
            os.killpg(pid, signal.SIGKILL) if victim & _ALL else os.kill(pid, signal.SIGKILL)
