"""Counts what one run of a graph does: nodes, bytes of weights and caches read, multiplications."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from exporter.artifacts import GraphWork
from exporter.models.work.products import multiplications
from exporter.models.work.run_shapes import RunShapes
from exporter.models.work.sizes import (
    PROMPT,
    PROMPT_TOKENS,
    STEP,
    RunSize,
    has_caches,
    input_sizes,
    is_cache,
    past_length,
    token_count,
)
from graph_passes.files.storage import load_model
from graph_passes.finding.dataflow import subgraphs
from graph_passes.finding.weights import constant_weight, is_weight

_GATHERS = frozenset({"Gather", "GatherBlockQuantized"})
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators that hand numbers on where they are, and read none."""
_MOVES = frozenset(
    {"Concat", "Transpose", "Expand", "Slice", "Split", "Cast", "Tile", "Gather", "Pad", "Where"}
    | {"GatherElements", "ScatterND", "ScatterElements", "TensorScatter"}
    | {"QuantizeLinear", "DequantizeLinear"}
)
"""Operators that copy numbers elsewhere, as they are or in another type."""
_ANGLES = {
    ("com.microsoft", "GroupQueryAttention"): (7, 8),
    ("com.microsoft", "RotaryEmbedding"): (2, 3),
    ("", "RotaryEmbedding"): (1, 2),
}
"""By domain and operator, tables of angles by position, of which it reads a row for each token."""
_SIZE_READS = frozenset({"Shape", "Size"})


def count_work(onnx: Path) -> GraphWork:
    """Counts what runs of an ONNX file do; weights are not read.

    Raises:
        OnnxFileError: It can't be read safely.
    """
    return work_of(load_model(onnx))


def work_of(model: ir.Model) -> GraphWork:
    """Counts what runs of a graph do: of a prompt, and of a step behind a filled cache.

    A graph without caches has no steps: what it reads of weights is told of a prompt.
    """
    prompt = _Run(model, PROMPT)
    step = _Run(model, STEP) if has_caches(model.graph) else None
    read = step or prompt
    return GraphWork(
        nodes=dict(sorted(Counter(n.op_type for n in model.graph.all_nodes()).items())),
        prompt_tokens=prompt.tokens,
        step_past=None if step is None else step.past,
        weight_bytes=read.weight_bytes,
        cache_bytes=None if step is None else step.cache_bytes,
        prompt_macs=prompt.macs,
        step_macs=None if step is None else step.macs,
        uncounted=dict(sorted((prompt.uncounted | read.uncounted).items())),
    )


def count_stack_work(
    encoder: Path, first: Path, later: Path, *, prompt: int, past: int, source: int | None
) -> GraphWork:
    """Counts what an encoder-decoder's graphs do; weights are not read.

    A prompt is a source through the encoder, once, and the decoder's first step; a step is one of
    the decoder with its caches. Nodes are those of all three graphs.

    Args:
        encoder: The encoder's ONNX file.
        first: That of the decoder's first step.
        later: That of its further steps.
        prompt: Tokens of the first step.
        past: Positions of the cache of self-attention in a step.
        source: The most tokens that the encoder reads; None for no limit. Of features, whose
            length is one, it doesn't matter.

    Raises:
        OnnxFileError: One can't be read safely.
    """
    models = [load_model(path) for path in (encoder, first, later)]
    tokens = min(PROMPT_TOKENS, source or PROMPT_TOKENS)
    sizes = RunSize(tokens), RunSize(prompt, source=tokens), RunSize(1, past, tokens)
    runs = [_Run(model, size) for model, size in zip(models, sizes, strict=True)]
    nodes: Counter[str] = Counter()
    for model in models:
        nodes += Counter(node.op_type for node in model.graph.all_nodes())
    reading, step = runs[0], runs[2]
    return GraphWork(
        nodes=dict(sorted(nodes.items())),
        prompt_tokens=reading.tokens,
        step_past=past,
        weight_bytes=step.weight_bytes,
        cache_bytes=step.cache_bytes,
        prompt_macs=reading.macs + runs[1].macs,
        step_macs=step.macs,
        uncounted=dict(sorted(sum((run.uncounted for run in runs), Counter[str]()).items())),
        has_encoder=True,
    )


class _Run:
    """One run's sums.

    Attributes:
        tokens: New ones; None of a graph that takes none, such as one of images.
        past: Positions of the cache; None without one.
        weight_bytes: What nodes read of weights, as often as they do; of tables the rows alone.
        cache_bytes: What nodes read of caches and of their copies, as often as they do.
        macs: Multiplications of matrix products; masked positions count.
        uncounted: By operator, nodes whose work or sizes the graph doesn't tell.
    """

    def __init__(self, model: ir.Model, size: RunSize) -> None:
        self._shapes = RunShapes(model, input_sizes(model.graph, size))
        self._caches = {value for value in model.graph.inputs if is_cache(value)}
        self._viewed_weights: set[ir.Value] = set()
        self.tokens, self.past = token_count(model.graph, size), past_length(model.graph, size)
        self.uncounted: Counter[str] = Counter()
        self.weight_bytes = self.cache_bytes = self.macs = 0
        for node in model.graph:
            self.macs += self._known(node, multiplications(node, self._shapes))
            if any(subgraphs(node)):  # what runs of an If, and how often a Loop runs, isn't told
                self.uncounted[node.op_type] += 1
            if node.op_type not in _SIZE_READS:
                self._read(node)

    def _read(self, node: ir.Node) -> None:
        for slot, value in enumerate(node.inputs):
            if value is None or node.op_type in _VIEWS:
                continue
            if self._is_weight(value):
                self.weight_bytes += self._weight_read(node, slot)
            elif value in self._caches:
                self.cache_bytes += self._known(node, self._shapes.nbytes(value))
        if node.op_type in _VIEWS and node.inputs[0] and self._is_weight(node.inputs[0]):
            self._viewed_weights.update(node.outputs)
        moved = node.op_type in _VIEWS or node.op_type in _MOVES
        if moved and any(value in self._caches for value in node.inputs):
            self._caches.update(node.outputs)

    def _is_weight(self, value: ir.Value) -> bool:
        node = value.producer()
        constant = node is not None and constant_weight(node) is not None
        return constant or is_weight(value) or value in self._viewed_weights

    def _weight_read(self, node: ir.Node, slot: int) -> int:
        value = node.inputs[slot]
        assert value is not None
        whole, shape = self._known(node, self._shapes.nbytes(value)), self._shapes.of(value)
        if slot in _ANGLES.get((node.domain, node.op_type), ()) and shape:
            return math.ceil(whole * min(self.tokens or shape[0], shape[0]) / max(shape[0], 1))
        if node.op_type not in _GATHERS or slot == 1 or not shape:
            return whole
        indices = self._shapes.of(node.inputs[1]) if len(node.inputs) > 1 else None
        axis = node.attributes.get_int("gather_axis", node.attributes.get_int("axis", 0))
        rows = self._known(node, None if indices is None else math.prod(indices))
        return math.ceil(whole * rows / max(shape[axis % len(shape)], 1))

    def _known(self, node: ir.Node, found: int | None) -> int:
        if found is None:
            self.uncounted[node.op_type] += 1
        return found or 0
