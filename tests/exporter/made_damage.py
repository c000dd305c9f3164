"""A meter whose damages are made up: every sublayer has its own, and pairs add to each other's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np

from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.models.ablation.damage import Damage

LAYERS = 3
NAMES: list[Any] = [(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp")]
REPLACEMENTS: list[Any] = ["none", "bias", "linear"]


@dataclass
class MadeMeter:
    """Damage = sum over sublayers of ``alone * share(replacement)``, and of pairs."""

    alone: Mapping[Any, float]
    together: Mapping[Any, float] = field(default_factory=dict)
    shares: Mapping[BranchReplacement, float] = field(default_factory=dict)
    scale: float = 1.0
    calls: int = 0

    @property
    def num_layers(self) -> int:
        return LAYERS

    def kl(self, cut: Mapping[Any, BranchReplacement]) -> float:
        share = {name: self.shares.get(what, 1.0) for name, what in cut.items()}
        total = sum(self.alone[name] * share[name] for name in cut)
        for one, other in combinations(sorted(cut), 2):
            total += self.together.get((one, other), 0.0) * share[one] * share[other]
        return self.scale * total

    def measure_many(self, cut: Any, others: Sequence[Any], progress: Any = None) -> list[Damage]:
        self.calls += 1 + len(others)
        return [self._damage(self.kl(item)) for item in (cut, *others)]

    @staticmethod
    def _damage(kl: float) -> Damage:
        """The perplexity's log rises by as much; the agreement falls by a third of it."""
        counts = np.array([5000.0, 5000.0])
        nll = 3 * counts
        agreements = counts * max(0.0, 1 - kl / 3)
        return Damage(counts, counts * kl, agreements, nll + counts * kl, nll)


@dataclass(frozen=True)
class MadeUnit:
    """A unit with gains of one's own."""

    gains: Mapping[Any, float]
    whole: float = 100.0

    def gain(self, names: Sequence[Any], replacement: Any) -> float:
        return sum(self.gains[name, replacement] for name in names)

    def words(self, gain: float) -> str:
        return f"{gain:.1f} of it"


def made_case(seed: int) -> tuple[MadeMeter, list[Any], MadeUnit]:
    """A meter, options for every sublayer and replacement, and a unit."""
    from exporter.choose.selection.options import Option

    rng = np.random.default_rng(seed)
    made = {(n, r): BranchReplacement() for n in NAMES for r in REPLACEMENTS[1:]}
    shares = {s: float(rng.uniform(0.1, 0.9)) for s in made.values()}
    alone = {name: float(rng.exponential(0.2)) for name in NAMES}
    pairs = {pair: float(rng.exponential(0.05)) for pair in combinations(sorted(NAMES), 2)}
    options = [
        Option((n,), replacement=r, branch_replacements={n: made[n, r]} if r != "none" else {})
        for n in NAMES for r in REPLACEMENTS
    ]  # fmt: skip
    whole = {name: float(rng.uniform(2, 10)) for name in NAMES}
    kept = {"none": 1.0, "bias": 0.98, "linear": 0.7}
    gains = {(n, r): whole[n] * kept[r] for n in NAMES for r in REPLACEMENTS}
    return MadeMeter(alone, pairs, shares), options, MadeUnit(gains)


def every_walk(options: Sequence[Any]) -> Iterator[list[Any]]:
    """Every way of treating some sublayers, but not all of them."""
    by_name: dict[Any, list[Any]] = {}
    for option in options:
        by_name.setdefault(option.names, []).append(option)
    for picked in product(*([None, *own] for own in by_name.values())):
        result = [option for option in picked if option is not None]
        if 0 < len(result) < len(NAMES):
            yield result
