"""The sizes of a graph's inputs for one run: a prompt, or a step behind a filled cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from exporter.models.graph_facts import CACHE_INPUT
from graph_passes.finding.shapes import head_count, head_size

PROMPT_TOKENS = 128
STEP_PAST = 512
"""Positions that the cache holds when a step is counted."""

_STACK_CACHE = re.compile(r"past_key_values\.[0-9]{1,4}\.(decoder|encoder)\.(spare\.)?(key|value)")
_TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds")

Size = tuple[int, ...]


@dataclass(frozen=True)
class RunSize:
    """One run of a graph, of one sequence.

    Attributes:
        tokens: New tokens.
        past: Tokens in the KV cache.
        source: Tokens that an encoder has read for it; None where the graph is no decoder of such.
    """

    tokens: int
    past: int = 0
    source: int | None = None


PROMPT, STEP = RunSize(PROMPT_TOKENS), RunSize(1, STEP_PAST)


def has_caches(graph: ir.Graph) -> bool:
    """Whether a graph takes a KV cache."""
    return any(map(is_cache, graph.inputs))


def is_cache(value: ir.Value) -> bool:
    """Whether it is an input for a cache, of an encoder-decoder for either kind of attention."""
    name = value.name or ""
    return bool(CACHE_INPUT.fullmatch(name) or _STACK_CACHE.fullmatch(name))


def _is_of_source(value: ir.Value) -> bool:
    """Whether an encoder-decoder's input is as long as what its encoder has read."""
    name = value.name or ""
    own = name in ("encoder_hidden_states", "encoder_attention_mask")
    return own or (is_cache(value) and ".encoder." in name)


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
    inputs = (v for v in _inputs(graph) if not _is_of_source(v))
    caches = (v for v in inputs if is_cache(v) and _axes(v) > 1)
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
    if run.source is not None and _is_of_source(value):
        return run.source  # heads and sizes of heads are numbers in such graphs
    if is_cache(value):
        if axis == 1:
            return head_count(value) or 1
        return run.past if axis == len(value.shape) - 2 else head_size(value) or 1
    return run.tokens + (run.past if value.name == "attention_mask" else 0)
