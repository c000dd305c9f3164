"""Fills one module after another from a checkpoint, the next one being read meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from exporter.models.loading.meta_model import Fetched, MetaModel


def filled_in_turn(meta: MetaModel, prefixes: Sequence[str]) -> Generator[int]:
    """Yields each module's place in the list while it is filled; at most two are in memory.

    Close the generator, so that nothing stays filled when the caller fails.

    Args:
        meta: The model.
        prefixes: The modules' dotted names.

    Raises:
        ModelSourceError: A shard can't be read.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming: list[Future[Fetched]] = [pool.submit(meta.weights.fetch, prefixes[0], stop)]
        try:
            for number, prefix in enumerate(prefixes):
                # Popped: a future that is kept keeps the tensors, too.
                meta.materialise(prefix, coming.pop().result())
                if number + 1 < len(prefixes):
                    coming.append(pool.submit(meta.weights.fetch, prefixes[number + 1], stop))
                try:
                    yield number
                finally:
                    meta.release(prefix)
        finally:
            stop.set()  # the pool waits for what it reads, and that may be a gigabyte
