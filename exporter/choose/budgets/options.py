"""What may be done to a model's sublayers, what is chosen of it, and how many may go."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NoReturn

from exporter.artifacts import HealKind, ImportanceReport, PlannedDeletion
from exporter.artifacts.plans import parse_drops
from exporter.artifacts.servers import Server, places_of
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.budget import Budget
from exporter.choose.budgets.units import Unit
from exporter.errors import PlanError, UsageError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.damage import AnyDamage
from exporter.printable import are, counted
from graph_passes.types import BLOCK_KINDS, DeletionKind, Replacement, SublayerRef

if TYPE_CHECKING:
    from exporter.heal.fit import Fit
    from exporter.models.loading.model_source import LoadedModel


Group = DeletionKind | Literal["joint"]
"""Of what a number is asked for; ``joint``: attentions and MLPs together."""


@dataclass(frozen=True, eq=False)
class Option:
    """One thing that may be done to one sublayer, or to the two of a block."""

    names: tuple[SublayerRef, ...]
    gain: float = 1.0
    replacement: Replacement = "none"
    branch_replacements: Mapping[SublayerRef, BranchReplacement] = field(default_factory=dict)
    given_back: float | None = None  # the share of the branch that a fit explains; None: unknown

    @property
    def cut(self) -> BranchReplacements:
        """What it puts in the place of which branch."""
        return {name: self.branch_replacements.get(name, NOTHING) for name in self.names}

    def touches(self, other: Option) -> bool:
        """Whether both change a sublayer in common."""
        return bool({*self.names} & {*other.names})

    def deletions(self) -> list[PlannedDeletion]:
        """Its lines in a plan; both sublayers of one layer make a block."""
        layers = {layer for layer, _ in self.names}
        whole = len(layers) == 1 and {kind for _, kind in self.names} == set(BLOCK_KINDS)
        named: list[tuple[int, DeletionKind]] = (
            [(layer, "block") for layer in layers] if whole else list(self.names)
        )
        return [
            PlannedDeletion(layer=layer, kind=kind, replacement=self.replacement)
            for layer, kind in named
        ]

    def __str__(self) -> str:
        """In words, for progress and errors: ``attention 25 (linear)``."""
        place = "" if self.replacement == "none" else f" ({self.replacement})"
        return ", ".join(f"{d.kind} {d.layer}{place}" for d in self.deletions())


@dataclass(frozen=True, eq=False)
class Step:
    """One decision of a search."""

    option: Option
    damage: AnyDamage
    gain: float


def options_for(
    group: Group, stacks: Stacks, protected: Collection[SublayerRef] = ()
) -> list[Option]:
    """An option of gain 1 for each sublayer, or block, that may go, in the layers' order."""
    options = []
    for layer in range(stacks.layers):
        refs = stacks.named(layer, "block")
        if group == "block":
            options.append(Option(tuple(refs)))
        else:
            options += [Option((ref,)) for ref in refs if group in ("joint", ref.kind)]
    return [option for option in options if not {*protected} & {*option.names}]


def most_sublayers(num_layers: int, allow_all: bool) -> int:
    """How many sublayers may go: one stays, unless everything is allowed to go."""
    return len(BLOCK_KINDS) * num_layers - (not allow_all)


@dataclass(frozen=True, eq=False)
class PlanCandidate:
    """What is done to a model: options in the order in which they were chosen."""

    options: tuple[Option, ...] = ()

    @property
    def cut(self) -> BranchReplacements:
        """What stands in the place of which branch."""
        return {name: what for option in self.options for name, what in option.cut.items()}

    @property
    def choices(self) -> dict[SublayerRef, Replacement]:
        """Each sublayer with what takes its place."""
        return {name: option.replacement for option in self.options for name in option.names}

    @property
    def deletions(self) -> list[PlannedDeletion]:
        """The same as a plan has it."""
        return [deletion for option in self.options for deletion in option.deletions()]

    def plus(self, *options: Option) -> PlanCandidate:
        """Some further; one takes the place of earlier ones on the same sublayers."""
        kept = list(self.options)
        for option in options:
            kept = [other for other in kept if not option.touches(other)] + [option]
        return PlanCandidate(tuple(kept))

    @property
    def worth(self) -> float:
        """What its options gain together."""
        return math.fsum(option.gain for option in self.options)

    def takes(self, option: Option, most: int, beside: Collection[SublayerRef] = ()) -> bool:
        """Whether an option adds to it, or takes the whole place of some that gain less."""
        gone = [other for other in self.options if option.touches(other)]
        names = {*beside, *self.choices, *option.names}
        whole = all({*other.names} <= {*option.names} for other in gone)
        return whole and option.gain > math.fsum(o.gain for o in gone) and len(names) <= most

    def without(self, option: Option) -> PlanCandidate:
        """One step less."""
        return PlanCandidate(tuple(other for other in self.options if other is not option))

    def gain(self, unit: Unit) -> float:
        """What goes with all of it."""
        return math.fsum(unit.gain(option.names, option.replacement) for option in self.options)


Stop = Callable[[Step], bool]
"""Told of each step; True ends a search."""


def protected_names(texts: Iterable[str], stacks: Stacks) -> frozenset[SublayerRef]:
    """Reads what is to stay."""
    layers, encoder = stacks.layers, stacks.encoder
    ends: dict[str, Sequence[int]] = {"first": [0], "last": [layers - 1]}
    if stacks.decoder:
        ends = {
            "first": [0, encoder],
            "last": [encoder - 1, layers - 1],
            "encoder": range(encoder),
            "decoder": range(encoder, layers),
        }
    names: set[SublayerRef] = set()
    for text in map(str.strip, texts):
        if text in ends:
            names.update(stacks.every((layer, "block") for layer in ends[text]))
        elif ":" in text:
            try:
                names.update(stacks.every(parse_drops([text]).deletions))
            except PlanError as error:
                raise UsageError(
                    f"--protect {text}: {error.message}",
                    f"Name layers of this model, or {', '.join(ends)}.",
                    code=error.code,
                ) from None
        else:
            raise UsageError(
                f"--protect {text}: this is not a set of sublayers.",
                f"Give {', '.join(ends)}, or kind:layers such as attention:0,29.",
                code="no-sublayers",
            )
    return frozenset(names)


_GROUPS: tuple[Group, ...] = ("attention", "cross_attention", "mlp", "block", "joint")


def groups_of(counts: Mapping[str, int]) -> Iterator[tuple[Group, int]]:
    """What is asked for and how many, in the order in which they are chosen."""
    for group in _GROUPS:
        if counts.get(group):
            yield group, counts[group]


def refuse_counts(
    report: ImportanceReport,
    counts: Mapping[str, int],
    protected: frozenset[SublayerRef],
    *,
    allow_all: bool,
) -> None:
    """Refuses before the model is loaded more than may go, or everything."""
    model = report.model
    stacks = Stacks.numbered(model.num_layers, model.encoder_layers)
    for group, number in groups_of(counts):
        sizes = sorted(len(option.names) for option in options_for(group, stacks, protected))
        most = most_sublayers(model.num_layers, allow_all)
        left = sum(size <= most for size in accumulate(sizes))
        if number > left:
            refuse_number(group, number, left, model.source)


def refuse_number(group: Group, number: int, left: int, model: str) -> NoReturn:
    """Refuses a number of one group, of which a model has only so many left."""
    what = {"joint": "sublayer", "mlp": "MLP"}.get(group, group)
    raise PlanError(
        f"{counted(number, what)} {are(number)} to be dropped, but of {model} only {left} may "
        "be dropped.",
        f"Ask for at most {left}: protected sublayers are kept, and at least one sublayer.",
        code="too-many",
    )


def refuse_another_model(report: ImportanceReport, loaded: LoadedModel) -> None:
    """Refuses scores of another model than the one that the search would run."""
    if report.model.sha256 != loaded.ref.sha256:
        raise PlanError(
            f"The scores are of {report.model.source} (sha256 {report.model.sha256[:12]}), but "
            f"{loaded.ref.source} is another model (sha256 {loaded.ref.sha256[:12]}).",
            "Name the model that was scored, or score this one first: depthcut score.",
            code="another-model",
        )


REPLACEMENTS: dict[HealKind | None, tuple[Replacement, ...]] = {
    None: ("none",),
    "bias": ("bias",),
    "linear": ("linear",),
    "best": ("none", "bias", "linear"),
}
"""What may take a branch's place."""


def sublayer_options(
    num_layers: int,
    budget: Budget,
    heal: HealKind | None,
    fits: Mapping[SublayerRef, Fit],
    protected: Collection[SublayerRef] = (),
    known: Collection[SublayerRef] | None = None,  # None: all
    without_map: Collection[SublayerRef] = (),
    server: Server | None = None,  # the runtime that has to hold what is chosen; None: any
) -> list[Option]:
    """Every sublayer (or block, where blocks are asked for) in every way allowed."""

    def option(names: tuple[SublayerRef, ...], how: Replacement) -> Option:
        if how == "none":
            return Option(names, given_back=0.0)
        own, is_bias = {name: fits[name] for name in names}, how == "bias"
        stand_ins = {name: fit.bias if is_bias else fit.linear for name, fit in own.items()}
        given = [f.bias_explained if is_bias else f.linear_explained for f in own.values()]
        return Option(names, 1.0, how, stand_ins, given_back=sum(given) / len(given))

    return [
        option(names, how)
        for names in subjects(num_layers, budget)
        if not {*names} & {*protected}
        if known is None or {*names} <= {*known}
        for how in REPLACEMENTS[heal]
        if how != "linear" or not {*names} & {*without_map}
        if all(how in places_of(server, name) for name in names)
    ]


def prior_of(report: ImportanceReport, options: Iterable[Option]) -> dict[SublayerRef, float]:
    """What is guessed of sublayers before anything is measured: scores, less what is given back."""
    scores = {(score.layer, score.kind): score.score for score in report.scores}
    best: dict[SublayerRef, float] = {}
    for option in options:
        for name in option.names:
            best[name] = max(best.get(name, 0.0), min(1.0, option.given_back or 0.0))
    return {name: scores.get(name, 0.0) * (1 - given) for name, given in best.items()}


def subjects(num_layers: int, budget: Budget) -> Iterator[tuple[SublayerRef, ...]]:
    """The sublayers, or the two of a block, that may go."""
    counts = (budget.attention, budget.mlp, budget.joint)
    others = (*counts, budget.parameters, budget.fits, budget.target_speedup)
    for layer in range(num_layers):
        if budget.block:
            yield tuple(SublayerRef(layer, kind) for kind in BLOCK_KINDS)
        if not budget.block or any(other for other in others):
            for kind in budget.kinds:
                yield (SublayerRef(layer, kind),)


_ABOUT = 0.9
"""An option that gains this share of another's gains about as much."""


def with_gains(options: Iterable[Option], unit: Unit) -> list[Option]:
    """The options that gain something, with that gain, without those that another surely beats."""
    gaining = [replace(o, gain=unit.gain(o.names, o.replacement)) for o in options]
    gaining = [option for option in gaining if option.gain > 0]

    def price(option: Option) -> float:
        """Damage for the gain, by what of the branch is not given back."""
        return (1 - min(1.0, option.given_back or 0.0)) / option.gain

    def is_beaten(option: Option) -> bool:
        return option.given_back is not None and any(
            other.names == option.names
            and other.gain >= _ABOUT * option.gain
            and price(other) < price(option)
            for other in gaining
        )

    return [option for option in gaining if not is_beaten(option)]
