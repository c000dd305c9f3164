"""Which output continues which cache input, in the names that exporters give them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from exporter.engines.runners.base import Runner
from exporter.errors import BackendError
from exporter.models.graph_facts import CACHE_INPUT

LOGITS = "logits"


def cache_pairs(pasts: Iterable[str], outputs: Collection[str]) -> dict[str, str]:
    """By cache input, the output that is its next content.

    Raises:
        BackendError: A cache input has none.
    """
    found = {}
    for past in pasts:
        names = [past.replace("past_key_values", new, 1) for new in ("present", "cache")]
        names.append(past.replace("past", "present", 1))
        present = next((name for name in names if name in outputs), None)
        if present is None:
            raise BackendError(f"No output continues the cache {past!r}.")
        found[past] = present
    return found


def runner_caches(runner: Runner) -> dict[str, str]:
    """The same of an entered runner; empty where it has no cache.

    Raises:
        BackendError: A cache input has no output that continues it.
    """
    pasts = [spec.name for spec in runner.inputs if CACHE_INPUT.fullmatch(spec.name)]
    return cache_pairs(pasts, [spec.name for spec in runner.outputs])
