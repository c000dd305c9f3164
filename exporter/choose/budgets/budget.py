"""What a user asks of a plan: what is to be gained, at what cost, and how that is searched for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from exporter.artifacts.figures import options_of
from exporter.artifacts.plan_figures import LIMITED, PlanFigure
from exporter.choose.costs.table import RequestShape, RequestShapeOption
from exporter.errors import PlanError, UsageError
from exporter.models.ablation.damage import Objective
from exporter.option_types import (
    Count,
    OpenShare,
    Several,
    Size,
    Tokens,
    Whole,
    Written,
    amount,
    comma_list,
)
from exporter.options import Options, Rule, dataclass, excludes, key_at, option, part, required
from graph_passes.types import BLOCK_KINDS, SublayerKind

if TYPE_CHECKING:
    from exporter.models.tasks import Task

DROPPING = "What to drop"
Search = Literal["auto", "one-shot", "greedy"]
OF_SEARCHES = ("objective", "shortlist", "tokens")
"""The fields that only searches by damage heed."""
OF_EMBEDDINGS = ("cosine", "similarity")
REACHING = "What to reach"
USUAL_CONTEXT = 4096
ASK_HINT = (
    "Give a budget: a number of sublayers, --parameters 10%, --fits 8GB, --faster 1.2x, "
    "--at-most 5% or --min-top1-agreement 0.95."
)


@dataclass(frozen=True)
class SearchOptions(Options):
    """How the sublayers are chosen."""

    section = DROPPING
    search: Search | None = option(
        None,
        "How to choose. one-shot: drop the lowest scores. greedy: at each step drop what adds the "
        "least damage. auto: greedy if it takes minutes, otherwise one-shot without the first and "
        "last layer.",
        usual="plan: one-shot for numbers, otherwise greedy; export: auto",
    )
    objective: Objective | None = option(
        None,
        "For --search greedy: the damage to minimise: the KL divergence from "
        "the whole model's answers, the perplexity, 1 minus the cosine of the embeddings, or 1 "
        "minus the correlation of the similarities of pairs of texts (similarity). kl of a "
        "classifier is that of its classes.",
        usual="kl, for encoders cosine",
        rare=True,
    )
    protect: tuple[str, ...] = option(
        (),
        "What must not be dropped: first, last, or kind:layers such as attention:0,29; of an "
        "encoder-decoder also encoder or decoder. Repeatable.",
        metavar="WHAT",
    )
    shortlist: Whole = option(
        12, "For --search greedy: candidates to measure at each step; 0 for all.", config_only=True
    )
    tokens: Several = option(
        4096,
        "For --search greedy: tokens of the calibration text to measure candidates on.",
        "--search-tokens",
        config_only=True,
    )

    @property
    def kept_small(self) -> Objective:
        """The objective; that of next tokens where nothing is said."""
        return self.objective or "kl"

    @property
    def by_damage(self) -> bool:
        """Whether the damage decides, or may."""
        return self.search in ("auto", "greedy")


def _without_x(value: Any) -> Any:
    """Reads ``1.2x`` or ``1.2``; a number passes."""
    return amount(value.rstrip("xX"), "a factor as 1.2x") if isinstance(value, str) else value


_Kinds = Annotated[
    tuple[SublayerKind, ...],
    Field(min_length=1),
    comma_list,
    Written("KIND,KIND", listed=True),
]
_Speedup = Annotated[
    float, Field(gt=1, allow_inf_nan=False), BeforeValidator(_without_x), Written("X")
]
USUAL_REQUEST = RequestShape(batch=1, prompt=512, new=64)
"""What is made faster where nothing is said, as far as a model can serve it."""


@dataclass(frozen=True)
class Memory(Options):
    """Weights and KV caches are to fit into so many bytes."""

    section = REACHING
    switch = "limit_bytes"
    limit_bytes: Annotated[Size, Field(gt=0)] = required(
        "Memory for weights and caches, such as 8GB.",
        "--fits",
    )
    context: Tokens = option(
        USUAL_CONTEXT,
        "For --fits: tokens in a cache, such as 32k; unless given, no more than the model has.",
    )
    batch: Count = option(
        1, "For --fits: number of sequences with a cache.", "--sequences", config_only=True
    )


_LIMITS = {figure.key: figure.limit for figure in LIMITED.values() if figure.limit is not None}
_Floors: Any = options_of(_LIMITS.values(), REACHING)


@dataclass(frozen=True)
class Floors(_Floors):  # type: ignore[misc]
    """What the cut model's answers must keep, on tokens that the search has not seen."""

    def __bool__(self) -> bool:
        return any(self.on(figure) is not None for figure in LIMITED.values())

    def on(self, figure: PlanFigure) -> float | None:
        """The limit on a figure; None without any."""
        limit = _LIMITS.get(figure.key)
        value: float | None = None if limit is None else getattr(self, limit.name)
        return value

    def of_task(self, task: Task[Any]) -> Floors:
        """Those that such answers can be held to; others beside them are left out."""
        if self == USUAL_FLOORS:
            return Floors(**task.damage.kind.usual)
        figures = task.damage.kind.limited
        floors = Floors(**{f.limit.name: self.on(f) for f in figures if f.limit is not None})
        if self and not floors:
            raise PlanError(
                f"The limits are on figures that {type(task.model).__name__} doesn't have; it has "
                f"{' and '.join(figure.name for figure in figures)}.",
                f"Give {' or '.join(figure.flag for figure in figures)}.",
                code="other-limits",
            )
        return floors

    def used_up(self, figures: Mapping[str, float]) -> float:
        """The share of the limits that a cut uses up: 0 for none, 1 for all of one of them."""
        values = [0.0]
        for figure in LIMITED.values():
            if (limit := self.on(figure)) is not None:
                values.append(figure.used_up(figures.get(figure.key, figure.worst), limit))
        return max(values)


NO_FLOORS = Floors()
USUAL_FLOORS = Floors(**{limit.name: limit.usual for limit in _LIMITS.values()})
USUAL_LIMITS = {
    key_at(Floors, limit.name): limit.usual for limit in _LIMITS.values() if limit.usual is not None
}
"""After healing, where nothing is asked for; a model heeds those of its kind."""
_COUNTS = ("attention", "cross_attention", "mlp", "block", "joint")
_PATHS = tuple(f"floors.{limit.name}" for limit in _LIMITS.values())


def _leaves_out(kind: SublayerKind) -> Rule:
    def broken(value: Any) -> bool:
        return kind not in value.kinds and bool(getattr(value, kind) or value.block)

    return Rule(
        ("kinds", kind),
        broken,
        f"The budget drops sublayers of kind {kind}, which {{0}} does not include.",
        "Leave {0} out, or ask for another number.",
    )


@dataclass(frozen=True)
class Budget(Options):
    """Everything that a plan has to hold; what is not asked for is 0, None or without floors."""

    section = DROPPING
    attention: Whole = option(0, "Drop N attentions.", "--drop-attn")
    cross_attention: Whole = option(
        0, "Encoder-decoders: drop N cross-attentions of the decoder.", "--drop-cross", rare=True
    )
    mlp: Whole = option(0, "Drop N MLPs.", "--drop-mlp")
    block: Whole = option(0, "Drop N blocks.", "--drop-block")
    joint: Whole = option(0, "Drop N sublayers, all kinds ranked together.", "--drop-joint")
    keep_first: Count | None = option(
        None,
        "Keep the first N layers; the blocks of all behind them go.",
    )
    parameters: OpenShare | None = option(
        None,
        "Share of parameters to remove, such as 10%.",
        section=REACHING,
    )
    fits: Memory | None = part(None)
    target_speedup: _Speedup | None = option(
        None,
        "Speedup of the request --at, such as 1.2x; to within 3 % as measured.",
        "--faster",
        section=REACHING,
    )
    at: RequestShapeOption | None = option(
        None,
        "The request: batch=1,prompt=512,new=128; it is made faster.",
        usual=f"{USUAL_REQUEST} with --faster, and in export without a budget; for encoders new=0",
        section=REACHING,
    )
    floors: Floors = part(Floors())
    kinds: _Kinds = option(
        BLOCK_KINDS, "Kinds of sublayers that may be dropped.", section=REACHING, config_only=True
    )
    rules = (
        _leaves_out("attention"),
        _leaves_out("mlp"),
        excludes("joint", "attention", "a joint number already covers both kinds"),
        excludes("joint", "mlp", "a joint number already covers both kinds"),
        excludes("joint", "cross_attention", "a joint number already covers it"),
        *(
            excludes("keep_first", other, "it says all that is dropped")
            for other in (*_COUNTS, "parameters", "fits", "target_speedup", *_PATHS)
        ),
    )

    def __post_init__(self) -> None:
        if self.target_speedup is not None and self.at is None:
            object.__setattr__(self, "at", USUAL_REQUEST)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of sublayers or blocks that are asked for."""
        return {name: getattr(self, name) for name in _COUNTS if getattr(self, name)}

    @property
    def only_counts(self) -> bool:
        """Whether nothing but numbers is asked for."""
        others = (self.parameters, self.fits, self.target_speedup)
        return all(other is None for other in others) and not self.floors

    def refuse_empty(self) -> None:
        """Refuses a budget that asks for nothing."""
        if self.only_counts and not self.counts and self.keep_first is None:
            raise UsageError("The plan has no budget.", ASK_HINT, code="nothing-asked")

    def asked(self) -> dict[str, int | float | str]:
        """What was asked for, as a plan notes it."""
        numbers: dict[str, int | float | str | None] = {
            **self.counts,
            "keep_first": self.keep_first,
            "parameters": self.parameters,
            "target_speedup": self.target_speedup,
            "at": None if self.at is None else str(self.at),
            **{figure.asked: self.floors.on(figure) for figure in LIMITED.values()},
        }
        if self.fits is not None:
            numbers |= {
                "fits_bytes": self.fits.limit_bytes,
                "context": self.fits.context,
                "batch": self.fits.batch,
            }
        if self.kinds != BLOCK_KINDS:
            numbers["kinds"] = ",".join(self.kinds)
        return {name: value for name, value in numbers.items() if value is not None}


def asks_for_more_than_numbers(told: Mapping[str, Any]) -> bool:
    """Whether a budget, by its options' keys, asks for what no ranking of scores gives."""
    names = ("parameters", "fits", "faster")
    floors = (key_at(Floors, limit.name) for limit in _LIMITS.values())
    return any(told.get(name) is not None for name in (*names, *floors))
