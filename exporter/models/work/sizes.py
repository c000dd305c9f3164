"""The sizes of a graph's inputs for one run: a prompt, or a step behind a filled cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from exporter.models.graph_facts import CACHE_INPUT
from graph_passes.finding.shapes import head_count, head_size

PROMPT_TOKENS = 128
STEP_PAST = 512
"""Positions that the cache holds when a step is counted."""

_TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds")

Size = tuple[int, ...]


@dataclass(frozen=True)
class RunSize:
    """One run of a graph, of one sequence.

    Attributes:
        tokens: New tokens.
        past: Tokens in the KV cache.
    """

    tokens: int
    past: int = 0


PROMPT, STEP = RunSize(PROMPT_TOKENS), RunSize(1, STEP_PAST)


def has_caches(graph: ir.Graph) -> bool:
    """Whether a graph takes a KV cache."""
    return any(CACHE_INPUT.fullmatch(value.name or "") for value in graph.inputs)


def input_sizes(graph: ir.Graph, run: RunSize) -> dict[ir.Value, Size]:
    """The shape of every input that isn't a weight; sizes that the graph fixes stay as they are."""
    return {
        value: tuple(_size(value, axis, run) for axis in range(len(value.shape)))
        for value in _inputs(graph)
        if value.shape is not None
    }


def token_count(graph: ir.Graph, run: RunSize) -> int | None:
    """New tokens of a run, as many as the graph fixes; None where it takes no tokens."""
    found = (value for value in _inputs(graph) if value.name in _TOKENS and _axes(value) > 1)
    return next((_size(value, 1, run) for value in found), None)


def past_length(graph: ir.Graph, run: RunSize) -> int | None:
    """Positions of the caches, as many as the graph fixes; None without caches."""
    caches = (v for v in _inputs(graph) if CACHE_INPUT.fullmatch(v.name or "") and _axes(v) > 1)
    return next((_size(each, _axes(each) - 2, run) for each in caches), None)


def _axes(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


def _inputs(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from (value for value in graph.inputs if value.name not in graph.initializers)


def _size(value: ir.Value, axis: int, run: RunSize) -> int:
    assert value.shape is not None
    declared = value.shape[axis]
    if isinstance(declared, int):
        return declared
    if axis == 0:
        return 1  # one sequence
    if CACHE_INPUT.fullmatch(value.name or ""):
        if axis == 1:
            return head_count(value) or 1
        return run.past if axis == len(value.shape) - 2 else head_size(value) or 1
    return run.tokens + (run.past if value.name == "attention_mask" else 0)
