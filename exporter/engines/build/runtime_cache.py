"""Kernels that TensorRT-RTX has compiled on this card, kept from one load of an engine to the next.

A cache lies in the user's own cache folder, by engine, library, card and driver: what was compiled
for another is never asked for. The library checks it again, and refuses what doesn't fit.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.engines.build.driver import Driver
from exporter.engines.build.sidecar import EngineRecord
from exporter.errors import DepthcutError
from exporter.files import sha256_bytes
from graph_passes.files.placing import staging
from graph_passes.files.reading import read_bytes

_MOST_BYTES = 1 << 30


@dataclass
class RuntimeCache:
    """One engine's, for all of its contexts.

    Attributes:
        path: Where it is kept.
        cache: The library's own.
        read: What was read of it; empty where there was nothing.
        problem: Why what lay there was no use; empty where it was, or nothing lay there.
    """

    path: Path
    cache: Any
    read: bytes = b""
    problem: str = ""

    @classmethod
    def open(cls, config: Any, record: EngineRecord, driver: Driver) -> RuntimeCache:
        """Makes a cache for an engine, and reads what is kept of it.

        Args:
            config: An ``IRuntimeConfig`` of the engine; a CUDA context is there.
            record: The engine's.
            driver: Of the card that runs it, which comes first.
        """
        found = cls(cache_path(record, driver), config.create_runtime_cache())
        try:
            found.read = read_bytes(found.path, limit=_MOST_BYTES)
        except FileNotFoundError:
            return found
        except (OSError, DepthcutError) as error:
            found.problem = f"{found.path} can't be read ({error}): kernels are compiled again"
            return found
        if not found.cache.deserialize(found.read):
            found.read = b""
            with contextlib.suppress(OSError):
                found.path.unlink()  # ours; what is of another kind would not be replaced
            found.problem = (
                f"{found.path} is no runtime cache of this engine and card, or is broken: kernels "
                "are compiled again, and it is written anew"
            )
        return found

    def keep(self) -> None:
        """Writes what was compiled since, where that can be: it is of use, and nothing more."""
        told = self.cache.serialize()
        if told is None:
            return
        content = bytes(memoryview(told))
        if content == self.read:
            return
        with contextlib.suppress(OSError, DepthcutError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with staging(self.path) as staged:
                new = staged.folder / "cache"
                new.write_bytes(content)
                staged.place([(new, self.path)])


def cache_path(record: EngineRecord, driver: Driver) -> Path:
    """Where an engine's cache is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    named = (
        record.engine_sha256, record.backend, record.backend_version, driver.cuda_version,
        *(f"{card.name} {card.compute_capability}" for card in driver.devices[:1]),
    )  # fmt: skip
    name = sha256_bytes("\n".join(named).encode())[:32]
    return Path(home) / "depthcut" / "runtime-caches" / f"{name}.bin"
