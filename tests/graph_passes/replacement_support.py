"""Random replacements, and how far a cut with them is from the masked oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from graph_support import Arrays, feeds, largest_difference, run, session, sites_of

from graph_passes import Deletion, ReplacementTensors, SublayerRef, prune_graph
from graph_passes.testing import masked_model
from graph_passes.types import DeletionKind, Replacement

Given = dict[SublayerRef, ReplacementTensors]


def numbers(
    model: ir.Model,
    deletions: Iterable[Deletion],
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    rank: int | None = None,
) -> Given:
    """Random numbers for every replacement that is asked for; linear maps as factors of a rank."""
    rng = np.random.default_rng(seed)
    hidden = 32 if model.graph.name == "fused" else 8
    given = {}
    for deletion in deletions:
        for site in sites_of(model):
            meant = site.layer == deletion.layer and deletion.kind in (site.kind, "block")
            if not meant or deletion.replacement == "none":
                continue
            bias = rng.standard_normal(hidden).astype(dtype)
            if deletion.replacement == "bias":
                given[site.ref] = ReplacementTensors(bias)
            elif rank is None:
                weight = (rng.standard_normal((hidden, hidden)) / hidden**0.5).astype(dtype)
                given[site.ref] = ReplacementTensors(bias, weight)
            else:
                down = (rng.standard_normal((rank, hidden)) / hidden**0.5).astype(dtype)
                up = (rng.standard_normal((hidden, rank)) / rank**0.5).astype(dtype)
                given[site.ref] = ReplacementTensors(bias, factors=(down, up))
    return given


def plan(*entries: tuple[DeletionKind, int, Replacement]) -> list[Deletion]:
    return [Deletion(layer, kind, replacement) for kind, layer, replacement in entries]


def replaced_error(
    model: ir.Model,
    deletions: Sequence[Deletion],
    given: Mapping[SublayerRef, ReplacementTensors],
    *,
    optimise: bool = False,
    other: Mapping[SublayerRef, ReplacementTensors] | None = None,
    inputs: Sequence[Arrays] | None = None,
    allow_all: bool = False,
) -> float:
    """The largest difference from the masked original plus the replacements."""
    pruned, report = prune_graph(model, deletions, replacements=given, allow_all=allow_all)
    gone = [name for entry in report.deleted for name in entry.outputs_removed]
    oracle = masked_model(model, deletions, given if other is None else other)
    expected, actual = session(oracle, optimise=optimise), session(pruned, optimise=optimise)
    worst = 0.0
    for feed in feeds(model) if inputs is None else inputs:
        want = run(expected, feed)
        scale = max(float(np.abs(array).max(initial=1)) for array in want.values())
        worst = max(worst, largest_difference(want, run(actual, feed), gone) / scale)
    return worst
