"""What may be done to a model's sublayers, what is chosen of it, and how many may go."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NoReturn

from exporter.artifacts import HealKind, ImportanceReport, PlannedDeletion
from exporter.artifacts.plans import parse_drops
from exporter.artifacts.stacks import Stacks
from exporter.choose.budgets.budget import USUAL_CONTEXT, USUAL_REQUEST, Budget, Memory
from exporter.choose.costs.table import CostTable
from exporter.choose.costs.weighing import GraphSizes
from exporter.errors import PlanError, UsageError
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.ablation.damage import AnyDamage
from exporter.printable import are, counted
from exporter.progress import QUIET, Progress
from graph_passes.types import BLOCK_KINDS, DeletionKind, Replacement, SublayerKind, SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel


@dataclass(frozen=True, eq=False)
class Unit:
    """Something that every sublayer has a part of.

    ``gain`` is what goes with a sublayer or block, less what its replacement brings; ``words`` says
    a gain as a user does.
    """

    gain: Callable[[Sequence[SublayerRef], Replacement], float]
    words: Callable[[float], str]
    is_blocks: bool = False


@dataclass(frozen=True)
class Goal:
    """So much of a unit is to go."""

    unit: Unit
    amount: float


def words_of(goals: Iterable[Goal], gain: Callable[[Unit], float] | None = None) -> str:
    """The goals as a user says them, or what is gained of each."""
    return " and ".join(g.unit.words(g.amount if gain is None else gain(g.unit)) for g in goals)


def numbers_of(kinds: Sequence[SublayerKind], label: str) -> Unit:
    """One for every sublayer of some kinds, or without any for every block."""

    def gain(names: Sequence[SublayerRef], _: Replacement) -> float:
        if not kinds:
            return float(len(names) > 1)
        return float(len(names) == 1 and names[0][1] in kinds)

    return Unit(gain, lambda number: f"{counted(number, label)} dropped", not kinds)


def parameters_of(sizes: GraphSizes) -> Unit:
    """Weights, counted."""
    return Unit(
        lambda names, how: float(sum(sizes.saved_parameters(name, how) for name in names)),
        lambda gain: f"{100 * gain / sizes.parameters:.1f} % of the parameters removed",
    )


def bytes_of(sizes: GraphSizes, memory: Memory) -> Unit:
    """Weights and caches, in bytes; its words say what is left, since that is what has to fit."""
    context, batch = memory.context, memory.batch
    whole = sizes.total_bytes(context=context, batch=batch)
    saved = partial(sizes.saved_bytes, context=context, batch=batch)
    return Unit(
        lambda names, how: float(sum(saved(name, how) for name in names)),
        lambda gain: f"{(whole - gain) / 1e9:.4g} GB of weights and caches",
    )


def time_of(costs: CostTable) -> Unit:
    """A request's milliseconds."""
    whole = costs.baseline_ms
    return Unit(
        lambda names, how: sum(costs.saved_ms(name, how) for name in names),
        lambda gain: f"a speedup of {whole / max(whole - gain, 1e-9 * whole):.3f}",
    )


def goals_of(budget: Budget, sizes: GraphSizes, costs: CostTable | None) -> list[Goal]:
    """What has to go, the target speedup first."""
    goals = []
    if budget.target_speedup is not None and costs is not None:
        goals.append(Goal(time_of(costs), costs.baseline_ms * (1 - 1 / budget.target_speedup)))
    if budget.parameters is not None:
        goals.append(Goal(parameters_of(sizes), budget.parameters * sizes.parameters))
    if budget.fits is not None:
        held = bytes_of(sizes, budget.fits)
        whole = sizes.total_bytes(context=budget.fits.context, batch=budget.fits.batch)
        if whole > budget.fits.limit_bytes:
            goals.append(Goal(held, whole - budget.fits.limit_bytes))
        elif not goals and not budget.counts and not budget.floors:
            raise PlanError(
                f"Nothing needs to be dropped: the model has {held.words(0)} as it is.",
                "Ask for less memory, a longer --context or more --sequences.",
                code="fits-already",
            )
    return goals + number_goals(budget)


def number_goals(budget: Budget) -> list[Goal]:
    """How many sublayers or blocks are to go."""
    units = {
        "attention": numbers_of(("attention",), "attention"),
        "cross_attention": numbers_of(("cross_attention",), "cross-attention"),
        "mlp": numbers_of(("mlp",), "MLP"),
        "block": numbers_of((), "block"),
        "joint": numbers_of((*budget.kinds, "cross_attention"), "sublayer"),
    }
    return [Goal(units[name], number) for name, number in budget.counts.items()]


def unit_to_use_up(budget: Budget, sizes: GraphSizes, costs: CostTable | None) -> Unit:
    """What floors are used up for: a request's time where one is named, else parameters."""
    return parameters_of(sizes) if costs is None or budget.at is None else time_of(costs)


def on_graph(budget: Budget, sizes: GraphSizes, progress: Progress = QUIET) -> Budget:
    """What is usual, as a graph allows it.

    The context of --fits is no longer than the model can hold, and the request is one that users
    send: an encoder decodes nothing, and may cut texts.
    """
    fits, shape = budget.fits, budget.at
    if fits is not None and fits.context == USUAL_CONTEXT:
        fits = replace(fits, context=min(USUAL_CONTEXT, sizes.longest or USUAL_CONTEXT))
        progress.say(f"plan: caches for a context of {fits.context} tokens are to fit")
    if shape is not None and shape == USUAL_REQUEST:
        known = (sizes.longest, sizes.longest_text, shape.longest)
        longest = min(limit for limit in known if limit is not None)
        new = min(shape.new, longest // 2) if sizes.has_cache else 0
        shape = replace(shape, prompt=min(shape.prompt, longest - new), new=new)
        progress.say(f"plan: the request that is timed is {shape} (--at)")
    return replace(budget, fits=fits, at=shape)


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


def prior_of(report: ImportanceReport, options: Iterable[Option]) -> dict[SublayerRef, float]:
    """What is guessed of sublayers before anything is measured: scores, less what is given back."""
    scores = {(score.layer, score.kind): score.score for score in report.scores}
    best: dict[SublayerRef, float] = {}
    for option in options:
        for name in option.names:
            best[name] = max(best.get(name, 0.0), min(1.0, option.given_back or 0.0))
    return {name: scores.get(name, 0.0) * (1 - given) for name, given in best.items()}


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
