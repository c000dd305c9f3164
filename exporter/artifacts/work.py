"""The part of report.json that says what a run of a graph does, counted and not measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporter.artifacts.base import Record

WorkFigure = Literal[
    "nodes",
    "weight_bytes",
    "cache_bytes",
    "prompt_macs",
    "step_macs",
    "engine_layers",
    "scratch_bytes",
]
"""What is counted of an arm: of its graph, and of its engines as their builder tells, which chooses
by times and by the card."""


class GraphWork(Record):
    """What runs of a graph do, by the graph alone: the same on every machine.

    A prompt has ``prompt_tokens``, None of a graph that takes no tokens, such as one of images; a
    step is one token behind a cache of ``step_past`` positions, both of one sequence. ``nodes``
    counts by operator, subgraphs included. ``weight_bytes`` is what nodes read of weights in a
    step (without caches: for a prompt), each as often as nodes read it,
    and of tables the rows that are looked up. ``cache_bytes`` is what they read of caches, and of
    what these are copied to, in a step. ``prompt_macs`` and ``step_macs`` are the multiplications
    of matrix products; what a mask hides counts. ``uncounted`` counts, by operator, the nodes whose
    work or sizes the graph doesn't tell; none of it is in the sums. Figures of steps are None for a
    graph without caches.

    Of an encoder-decoder (``has_encoder``) a prompt is a source of ``prompt_tokens`` through the
    encoder and the decoder's first step, and a step is one of the decoder behind caches of
    ``step_past`` positions and of that source; ``nodes`` counts those of all three graphs.
    """

    nodes: dict[str, int]
    prompt_tokens: int | None
    step_past: int | None
    weight_bytes: int
    cache_bytes: int | None
    prompt_macs: int
    step_macs: int | None
    uncounted: dict[str, int] = Field(default_factory=dict)
    has_encoder: bool = False

    @property
    def figures(self) -> dict[WorkFigure, int]:
        """The figures by name, those that there are; ``nodes`` is their sum."""
        told: dict[WorkFigure, int | None] = {
            "nodes": sum(self.nodes.values()),
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "prompt_macs": self.prompt_macs,
            "step_macs": self.step_macs,
        }
        return {name: value for name, value in told.items() if value is not None}
