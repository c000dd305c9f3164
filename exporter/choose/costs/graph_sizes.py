"""What each sublayer of a graph takes: parameters, bytes of weights, bytes of KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from exporter.artifacts.latency import Shape
from exporter.errors import CostError
from graph_passes.types import Replacement, SublayerRef


@dataclass(frozen=True)
class CacheSize:
    """One input that holds keys, values or a state: ``fixed + per_token * positions`` bytes."""

    per_token: float = 0.0
    fixed: float = 0.0
    # positions at most, of a window or of a buffer, whose bytes are fixed; a state has none
    window: int | None = None

    def bytes(self, context: int) -> float:
        """Of one sequence of ``context`` tokens."""
        kept = context if self.window is None else min(context, self.window)
        return self.fixed + self.per_token * kept


@dataclass(frozen=True)
class SublayerSize:
    """What goes with a sublayer, its norm included."""

    parameters: int
    linear_parameters: int
    weight_bytes: int
    linear_weight_bytes: int
    takes_linear: bool = True
    caches: tuple[CacheSize, ...] = ()
    operators: int = 0  # nodes of its graph; 0 where there is none
    expert_parameters: int = 0  # of which each token takes the share `chosen`
    chosen: float = 1.0

    def used(self, tokens: int) -> tuple[float, float]:
        """Parameters that multiply a token, and bytes of weights that so many read at most."""
        held = self.weight_bytes * self.expert_parameters / max(1, self.parameters)
        unread = held * (1 - min(1.0, tokens * self.chosen))
        idle = self.expert_parameters * (1 - self.chosen)
        return self.parameters - idle, self.weight_bytes - unread

    def reach(self, context: int) -> int:
        """How many positions an attention looks at; a recurrent one at none."""
        keys = [cache for cache in self.caches if cache.per_token or cache.window is not None]
        windows = [cache.window for cache in keys if cache.window is not None]
        return 0 if self.caches and not keys else min([context, *windows])

    def kv_bytes(self, context: int, batch: int = 1) -> int:
        """What its cache takes for ``batch`` sequences of ``context`` tokens."""
        return cache_bytes(self.caches, context, batch)


def cache_bytes(caches: tuple[CacheSize, ...], context: int, batch: int) -> int:
    """What caches take for ``batch`` sequences of ``context`` tokens."""
    return batch * math.ceil(sum(cache.bytes(context) for cache in caches))


class Work(NamedTuple):
    """What one run of a model does."""

    multiplications: float  # by weights
    pair_multiplications: float  # of attentions, between positions
    weight_bytes: float  # with the start of each operator, which takes as long as some bytes
    cache_bytes: float


@dataclass(frozen=True)
class GraphSizes:
    """A graph's sublayers and the rest of it.

    Weights that several sublayers share belong to the rest: none of them removes them alone. What
    a set of sublayers removes may so be more than the sum of theirs, and never less.
    """

    sublayers: Mapping[SublayerRef, SublayerSize]
    parameters: int
    weight_bytes: int
    rest: SublayerSize = SublayerSize(0, 0, 0, 0)  # what is multiplied, and cached, beside them
    hidden: int | None = None  # width of the residual stream; None where the graph doesn't tell
    number_bytes: int = 4
    operator_bytes: int = 0  # weights that are read while an operator is started
    longest: int | None = None  # positions that the graph can hold; None where it sets no limit
    longest_text: int | None = None  # None where nothing says so
    name: str = field(default="the graph", compare=False)

    def __getitem__(self, name: SublayerRef) -> SublayerSize:
        """One sublayer's."""
        try:
            return self.sublayers[name]
        except KeyError:
            raise CostError(
                f"{self.name} has no {name[1]} {name[0]} that can be cut.",
                "depthcut inspect lists what it has.",
                code="sublayer-missing",
            ) from None

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes a cache or a state."""
        return bool(self.rest.caches) or any(
            sublayer.caches for sublayer in self.sublayers.values()
        )

    def replacement_parameters(self, replacement: Replacement) -> int:
        """Numbers that a replacement brings at most; a bias may find one that it is added to."""
        if replacement == "none":
            return 0
        if self.hidden is None:
            raise CostError(
                f"{self.name} doesn't declare the width of its residual stream, so the size of "
                f"a replacement ({replacement}) is unknown.",
                "Infer the graph's shapes first (onnx.shape_inference).",
                code="width-unknown",
            )
        if replacement == "bias":
            return self.hidden
        return self.hidden * (self.hidden + 1)

    def saved_parameters(self, name: SublayerRef, replacement: Replacement = "none") -> int:
        """How many parameters the graph loses; below 0 where a replacement is the larger one."""
        own = self[name]
        removed = own.linear_parameters if replacement == "linear" else own.parameters
        return removed - self.replacement_parameters(replacement)

    def saved_weight_bytes(self, name: SublayerRef, replacement: Replacement = "none") -> int:
        """How many bytes the weights lose; below 0 where a replacement is the larger one."""
        own = self[name]
        removed = own.linear_weight_bytes if replacement == "linear" else own.weight_bytes
        return removed - self.number_bytes * self.replacement_parameters(replacement)

    def saved_bytes(
        self, name: SublayerRef, replacement: Replacement = "none", *, context: int, batch: int
    ) -> int:
        """How many bytes the weights, and the caches of so many tokens, lose."""
        kept = self[name].kv_bytes(context, batch)
        return self.saved_weight_bytes(name, replacement) + kept

    def total_parameters(self, choices: Mapping[Any, Replacement] | None = None) -> int:
        """Parameters that are left, at most."""
        cut = (choices or {}).items()
        return self.parameters - sum(self.saved_parameters(*item) for item in cut)

    def total_bytes(
        self,
        choices: Mapping[Any, Replacement] | None = None,
        *,
        context: int = 0,
        batch: int = 1,
    ) -> int:
        """Bytes of all weights and caches that are left, at most."""
        if self.longest is not None and context > self.longest:
            raise CostError(
                f"{self.name} ends at {self.longest} positions; {context} were asked for.",
                "Ask for a shorter context.",
                code="context-too-long",
            )
        owners = (sublayer.caches for sublayer in self.sublayers.values())
        caches = self.rest.caches + tuple(cache for own in owners for cache in own)
        whole = self.weight_bytes + cache_bytes(caches, context, batch)
        cut = (choices or {}).items()
        return whole - sum(self.saved_bytes(*item, context=context, batch=batch) for item in cut)

    def work(self, cell: Shape, choices: Mapping[Any, Replacement] | None = None) -> Work:
        """What is left of a run's work where some sublayers are cut."""
        tokens, context, cut = cell.batch * cell.sequence_length, cell.total_length, choices or {}
        left = [size for name, size in self.sublayers.items() if name not in cut]
        used = [size.used(tokens) for size in [*left, self.rest]]
        for name, how in cut.items():
            own, saved = self[name], self.saved_weight_bytes(name, how)
            used.append(
                (own.parameters - self.saved_parameters(name, how), own.weight_bytes - saved)
            )
        pairs = (
            size.parameters / (2 * (self.hidden or 1)) * size.reach(context)
            for name, size in self.sublayers.items()
            if name[1] == "attention" and name not in cut
        )
        started = self.operator_bytes * sum(size.operators for size in [*left, self.rest])
        return Work(
            tokens * math.fsum(numbers for numbers, _ in used),
            tokens * math.fsum(pairs),
            math.fsum(held for _, held in used) + started,
            float(sum(size.kv_bytes(context, cell.batch) for size in [*left, self.rest])),
        )
