"""A comparison on CPUs of its own, where that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from exporter.artifacts import Pinning
from exporter.compare.options import TimingOptions
from exporter.engines.pinning import pinned
from exporter.printable import counted
from exporter.progress import Progress


@contextlib.contextmanager
def pinning(threads: int, options: TimingOptions, progress: Progress) -> Iterator[Pinning | None]:
    """Pins the process where that is asked for, and says what isn't allowed.

    Yields:
        What was done; None where it isn't asked for.
    """
    if not options.pin:
        yield None
        return
    with pinned(threads) as found:
        cpus = counted(len(found.cpus), "CPU")
        numbers = ", ".join(map(str, found.cpus))
        progress.say(f"time: on {cpus} ({numbers}), at priority {found.nice}")
        for each in found.refused:
            progress.say(f"time: not allowed: {each}")
        yield found
