"""The part of report.json that says what a graph and its engines consist of, counted."""

from __future__ import annotations

from typing import Any, Literal

from exporter.artifacts.base import Count, Record

WorkFigure = Literal["nodes", "weight_bytes", "cache_bytes", "engine_layers", "scratch_bytes"]
"""What is counted of an arm: of its graph, and of its engines as their builder tells, which chooses
by times and by the card."""


class GraphWork(Record):
    """What a graph consists of, the same on every machine.

    ``nodes`` counts by operator, subgraphs included. ``weight_bytes`` are its weights, of an
    encoder-decoder those of the encoder and of the decoder's first step. ``cache_bytes`` is what a
    token adds to its caches; None of a graph without.
    """

    nodes: dict[str, Count]
    weight_bytes: Count
    cache_bytes: Count | None = None

    @property
    def figures(self) -> dict[WorkFigure, int]:
        """The figures by name, those that there are; ``nodes`` is their sum."""
        figures: dict[WorkFigure, int] = {
            "nodes": sum(self.nodes.values()),
            "weight_bytes": self.weight_bytes,
        }
        return figures if self.cache_bytes is None else {**figures, "cache_bytes": self.cache_bytes}


def without_reads(work: Any) -> Any:
    """Of a report of an earlier version nothing: it counted what runs read and multiplied."""
    return None if isinstance(work, dict) and "prompt_macs" in work else work


def only_comparable(figures: Any) -> Any:
    """Of a history's line of an earlier version what is still counted in the same way."""
    if not isinstance(figures, dict) or "prompt_macs" not in figures:
        return figures
    gone = ("weight_bytes", "cache_bytes", "prompt_macs", "step_macs")
    return {name: count for name, count in figures.items() if name not in gone}
