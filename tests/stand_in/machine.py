"""Memory, streams and two clocks."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

ALIGNED = 256
_DIRTY_BYTES = 1 << 20  # of a buffer; all of a large one would take long
_DIRT = 0xFF  # as float32: NaN


class RuleError(AssertionError):
    """A documented rule was broken: on a card what follows would be undefined."""


@dataclass(frozen=True)
class Work:
    """What lies on a stream."""

    run: Callable[[], float | None]
    device_us: float = 0.0
    put_us: float = 0.0


@dataclass
class Stream:
    """Work in its order."""

    free_us: float = 0.0
    waiting: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    broken: bool = False


@dataclass
class Graph:
    """What was captured; it never changes."""

    work: tuple[Work, ...]


@dataclass
class Event:
    """A point of time, when its stream came to it."""

    at_us: float | None = None


@dataclass
class Machine:
    """One card."""

    memory_bytes: int = 1 << 30
    name: str = "Stand-in card"
    capability: str = "sm89"
    driver: int = 13010
    validity: str = "VALID"
    uuid: str = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    host_us: float = 0.0
    call_us: float = 1.0
    launch_us: float = 4.0
    calls: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    most_used: int = 0
    blocks: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    pinned: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    handles: dict[int, Any] = field(default_factory=dict)
    runs: list[Any] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)
    in_graph: bool = False
    _next: int = 1
    _keep: list[Any] = field(default_factory=list)

    @property
    def free_bytes(self) -> int:
        """Of the card's memory."""
        return self.memory_bytes - sum(self.used.values())

    @property
    def streams(self) -> dict[int, Stream]:
        """By their numbers."""
        return {n: thing for n, thing in self.handles.items() if isinstance(thing, Stream)}

    @property
    def left_over(self) -> dict[str, int]:
        """What nobody gave back, by kind; empty where all is well."""
        kinds = Counter(type(handle).__name__ for handle in self.handles.values())
        kinds.update({what: size for what, size in self.used.items() if size})
        kinds["pinned"] = len(self.pinned)
        return {what: count for what, count in kinds.items() if count}

    def handle(self, thing: Any) -> int:
        """A number for a thing of CUDA's."""
        self._next += 1
        self.handles[self._next] = thing
        return self._next

    def take(self, size: int, what: str) -> bool:
        """Takes memory of the card for what has no address here; whether there is so much."""
        if size > self.free_bytes:
            return False
        self.used[what] += size
        self.most_used = max(self.most_used, sum(self.used.values()))
        return True

    def give(self, size: int, what: str) -> None:
        """Gives it back."""
        self.used[what] -= size

    def allocate(self, size: int) -> int | None:
        """An address of dirty memory; None where there is too little."""
        return _add(self.blocks, size) if self.take(size, "buffers") else None

    def free(self, address: int) -> None:
        """Gives a block back; the device waits for all work first."""
        for stream in self.streams.values():
            self.drain(stream)
        if address not in self.blocks:
            raise RuleError(f"{address:#x} is freed, and is no block.")
        self.give(len(self.blocks.pop(address)), "buffers")

    def pin(self, size: int) -> int:
        """Host memory, dirty."""
        return _add(self.pinned, size)

    def unpin(self, address: int) -> None:
        """It goes only with the machine: arrays may still look at it."""
        self._keep.append(self.pinned.pop(address))

    def on_device(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """The bytes there; they must lie in one block."""
        return _within(self.blocks, address, size, "device memory")

    def on_host(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """The bytes there; they must be pinned."""
        return _within(self.pinned, address, size, "pinned memory")

    def put(self, stream: Stream, work: Work, *, host_us: float | None = None) -> None:
        """Puts work on a stream, or into what is captured from it."""
        self.host_us += self.call_us if host_us is None else host_us
        into = stream.waiting if stream.captured is None else stream.captured
        into.append(replace(work, put_us=self.host_us))

    def drain(self, stream: Stream) -> None:
        """Runs all that waits; the host waits for the device."""
        while stream.waiting:
            work = stream.waiting.pop(0)
            stream.free_us = max(stream.free_us, work.put_us) + work.device_us
            stream.free_us += work.run() or 0.0
        self.host_us = max(self.host_us, stream.free_us)

    def break_captures(self) -> bool:
        """What a call does that no capture allows; whether there was one."""
        capturing = [item for item in self.streams.values() if item.captured is not None]
        for stream in capturing:
            stream.broken = True
        return bool(capturing)


def _add(blocks: dict[int, np.ndarray[Any, Any]], size: int) -> int:
    raw = np.empty(size + ALIGNED, np.uint8)
    raw[:_DIRTY_BYTES] = _DIRT
    skip = -raw.ctypes.data % ALIGNED
    address = int(raw.ctypes.data) + skip
    blocks[address] = raw[skip : skip + size]
    return address


def _within(
    blocks: dict[int, np.ndarray[Any, Any]], address: int, size: int, what: str
) -> np.ndarray[Any, Any]:
    for begin, block in blocks.items():
        if begin <= address and address + size <= begin + len(block):
            content = (ctypes.c_uint8 * size).from_address(address)
            return np.frombuffer(content, np.uint8)
    raise RuleError(f"{size} bytes at {address:#x} are not all {what}.")
