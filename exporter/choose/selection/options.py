"""What may be done to a model's sublayers, and what a search has decided so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NoReturn

from exporter.artifacts import ImportanceReport, PlannedDeletion
from exporter.artifacts.plans import JOINT_KINDS, parse_drops
from exporter.artifacts.stacks import Stacks
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
    from exporter.models.loading.model_source import LoadedModel


Group = DeletionKind | Literal["joint"]
"""Of what a number is asked for; ``joint``: attentions and MLPs together."""

_SLACK = 1e-9  # gains are summed in floats


@dataclass(frozen=True, eq=False)
class Option:
    """One thing that may be done to one sublayer, or to the two of a block."""

    names: tuple[SublayerRef, ...]
    gain: float = 1.0
    replacement: Replacement = "none"
    branch_replacements: Mapping[SublayerRef, BranchReplacement] = field(default_factory=dict)

    @property
    def cut(self) -> BranchReplacements:
        """What it puts in the place of which branch."""
        return {name: self.branch_replacements.get(name, NOTHING) for name in self.names}

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


def standing_options(steps: Iterable[Step]) -> list[Option]:
    """What stands after all steps: an option gives way to a later one on the same sublayers."""
    standing: list[Option] = []
    for step in steps:
        standing = [o for o in standing if not overlap(o, step.option)] + [step.option]
    return standing


def cut_of_options(
    options: Iterable[Option], start: BranchReplacements | None = None
) -> dict[SublayerRef, BranchReplacement]:
    """The cut that several options make together, on top of another."""
    cut: dict[SublayerRef, BranchReplacement] = dict(start or {})
    for option in options:
        cut.update(option.cut)
    return cut


def total_gain(options: Iterable[Option]) -> float:
    """What several options are worth together."""
    return math.fsum(option.gain for option in options)


def most_sublayers(num_layers: int, allow_all: bool) -> int:
    """How many sublayers may go: one stays, unless everything is allowed to go."""
    return len(BLOCK_KINDS) * num_layers - (not allow_all)


def overlap(one: Option, other: Option) -> bool:
    """Whether both change a sublayer in common."""
    return bool(set(one.names) & set(other.names))


def reaches(gain: float, goal: float) -> bool:
    """Whether a gain is as much as the goal, up to rounding."""
    return gain >= goal - _SLACK * max(1.0, abs(goal) if math.isfinite(goal) else 1.0)


def refuse_gain(options: Sequence[Option], goal: float, room: int) -> None:
    """Refuses a goal beyond what all options are worth together."""
    most = total_gain(_most(options, room))
    if math.isfinite(goal) and not reaches(most, goal):
        raise PlanError(
            f"A gain of {goal:g} is out of reach: dropping everything that may be dropped "
            f"gains {most:g}.",
            f"Ask for at most {most:g}, or protect fewer sublayers.",
            code="out-of-reach",
        )


def _most(options: Sequence[Option], room: int) -> Iterator[Option]:
    """Options of the most gain that don't overlap, within the room."""
    taken: set[SublayerRef] = set()
    for option in sorted(options, key=lambda o: -o.gain / len(o.names)):
        if not taken & set(option.names) and len(taken) + len(option.names) <= room:
            taken.update(option.names)
            yield option


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


def refuse_too_many(
    report: ImportanceReport, counts: Mapping[str, int], protected: frozenset[SublayerRef]
) -> None:
    """Refuses more than have a score, where some are protected."""
    for group, number in groups_of(counts) if protected else ():
        kinds = JOINT_KINDS if group == "joint" else (group,)
        left = sum(score.kind in kinds for score in report.scores)
        if number > left:
            refuse_number(group, number, left, report.model.source)


def refuse_counts(
    report: ImportanceReport,
    counts: Mapping[str, int],
    protected: frozenset[SublayerRef],
    *,
    allow_all: bool,
) -> None:
    """Refuses before the model is loaded more than may go, or everything."""
    layers = report.model.num_layers
    for group, number in groups_of(counts):
        options = options_for(group, Stacks(layers), protected)
        left = len(options)
        if sum(len(option.names) for option in options) > most_sublayers(layers, allow_all):
            left -= 1
        if number > left:
            refuse_number(group, number, left, report.model.source)


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
