"""Runs inside the building process: TensorRT's memory of timed tactics.

Builds of TensorRT differ from run to run unless they use the same cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.errors import EngineError


def read_timing_cache(config: Any, path: Path) -> None:
    """Gives the builder a cache; an empty one where there is no file yet.

    Raises:
        EngineError: The file is no cache, or one of another card or version.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise EngineError(
            f"{path} is no timing cache of this card and version.",
            "Name another file, which is then begun anew.",
        )


def write_timing_cache(config: Any, path: Path) -> None:
    """Writes what the builder knows now.

    Raises:
        EngineError: The builder has no cache.
    """
    cache = config.get_timing_cache()
    if cache is None:
        raise EngineError("The builder gives no timing cache.")
    path.write_bytes(memoryview(cache.serialize()))
