"""What a user asks of a plan: how much is to be gained, and how much it may cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.errors import UsageError
from graph_passes.types import BLOCK_KINDS, SublayerKind

if TYPE_CHECKING:
    from exporter.choose.costs import At

_TOKENS = re.compile(r"(?P<number>\d+)\s*(?P<thousands>k)?", re.IGNORECASE)
ASK_HINT = (
    "Say what the plan is to reach: a number of sublayers, --parameters 10%, --fits 8GB, "
    "--target-speedup 1.25, --max-perplexity-increase 5% or --min-top1-agreement 0.95."
)


def tokens(text: str) -> int:
    """``32k`` (32 times 1024) or ``32768``.

    Raises:
        UsageError: It is neither, or 0.
    """
    told = _TOKENS.fullmatch(text.strip())
    number = int(told["number"]) * (1024 if told["thousands"] else 1) if told else 0
    if number < 1:
        raise UsageError(f"{text!r} is not a number of tokens.", "Write 32k or 32768.")
    return number


@dataclass(frozen=True)
class Memory:
    """Weights and KV caches are to fit into so many bytes.

    Attributes:
        limit_bytes: The room.
        context: Tokens that every sequence's caches hold.
        batch: Sequences.
    """

    limit_bytes: int
    context: int
    batch: int = 1

    def __post_init__(self) -> None:
        if min(self.limit_bytes, self.context, self.batch) < 1:
            raise UsageError(
                f"{self.limit_bytes} bytes for {self.batch} sequences of {self.context} tokens "
                "is no budget.",
                "Write --fits 8GB --context 32k --sequences 4.",
            )


@dataclass(frozen=True)
class Floors:
    """What the cut model's answers must keep, on tokens that the search has not seen.

    Attributes:
        perplexity_increase: By what share its perplexity may be higher, such as 0.05.
        top1_agreement: At what share of positions both models must think the same token the
            likeliest.
    """

    perplexity_increase: float | None = None
    top1_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.perplexity_increase is not None and not 0 < self.perplexity_increase < math.inf:
            raise UsageError(
                f"A perplexity that rises by at most {self.perplexity_increase:g} is no floor.",
                "Allow it some increase, such as 5%.",
            )
        if self.top1_agreement is not None and not 0 < self.top1_agreement < 1:
            raise UsageError(
                f"An agreement of {self.top1_agreement:g} can't be held.",
                "Ask for a share between 0 and 1, such as 0.95.",
            )

    def __bool__(self) -> bool:
        return self.perplexity_increase is not None or self.top1_agreement is not None

    @property
    def log_perplexity_increase(self) -> float:
        """The most that the log of the perplexity may rise."""
        increase = self.perplexity_increase
        return math.inf if increase is None else math.log1p(increase)


NO_FLOORS = Floors()


@dataclass(frozen=True)
class Budget:
    """Everything that a plan has to hold; what is not asked for is 0, None or without floors.

    Attributes:
        attention: Attentions to drop.
        mlp: MLPs to drop.
        block: Blocks to drop.
        joint: Sublayers to drop, of whatever kind.
        parameters: Share of the model's parameters to remove.
        fits: Room for weights and caches.
        target_speedup: How many times as fast a request is to be.
        at: The request: its batch, prompt and new tokens. Without a target speedup it says that
            floors are to be used up for speed.
        floors: What the answers must keep.
        kinds: Which sublayers may be dropped.
    """

    attention: int = 0
    mlp: int = 0
    block: int = 0
    joint: int = 0
    parameters: float | None = None
    fits: Memory | None = None
    target_speedup: float | None = None
    at: At | None = None
    floors: Floors = NO_FLOORS
    kinds: tuple[SublayerKind, ...] = BLOCK_KINDS

    def __post_init__(self) -> None:
        if self.parameters is not None and not 0 < self.parameters < 1:
            raise UsageError(
                f"A share of {self.parameters:g} of the parameters can't be removed.",
                "Ask for something between 0% and 100%, such as 10%.",
            )
        if self.target_speedup is not None and not 1 < self.target_speedup < math.inf:
            raise UsageError(
                f"A speedup of {self.target_speedup:g} needs no plan.",
                "Ask for more than 1, such as 1.25.",
            )
        if self.target_speedup is not None and self.at is None:
            raise UsageError(
                "How much a cut speeds up depends on the request.",
                "Say which is meant: --at batch=1,prompt=512,new=128.",
            )
        if not self.kinds:
            raise UsageError("No kind of sublayer may be dropped.", "Allow attention, mlp or both.")
        self._refuse_kinds()

    def _refuse_kinds(self) -> None:
        counted = {"attention": self.attention or self.block, "mlp": self.mlp or self.block}
        for kind, number in counted.items():
            if number and kind not in self.kinds:
                raise UsageError(
                    f"The budget wants sublayers of kind {kind} dropped, which --kinds leaves out.",
                    "Leave --kinds away, or ask for another number.",
                )
        if self.joint and (self.attention or self.mlp):
            raise UsageError(
                "The joint drop chooses among attentions and MLPs itself.",
                "Ask for a joint number, or for one of each kind.",
            )

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of sublayers or blocks that are asked for."""
        names = ("attention", "mlp", "block", "joint")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    @property
    def only_counts(self) -> bool:
        """Whether nothing but numbers is asked for."""
        others = (self.parameters, self.fits, self.target_speedup)
        return all(other is None for other in others) and not self.floors

    def refuse_empty(self) -> None:
        """Refuses a budget that asks for nothing.

        Raises:
            UsageError: It does.
        """
        if self.only_counts and not self.counts:
            raise UsageError("The plan is asked for nothing.", ASK_HINT)

    def asked(self) -> dict[str, int | float | str]:
        """What was asked for, as a plan notes it."""
        found: dict[str, int | float | str | None] = {
            **self.counts,
            "parameters": self.parameters,
            "target_speedup": self.target_speedup,
            "at": None if self.at is None else str(self.at),
            "max_perplexity_increase": self.floors.perplexity_increase,
            "min_top1_agreement": self.floors.top1_agreement,
        }
        if self.fits is not None:
            found |= {
                "fits_bytes": self.fits.limit_bytes,
                "context": self.fits.context,
                "batch": self.fits.batch,
            }
        if self.kinds != BLOCK_KINDS:
            found["kinds"] = ",".join(self.kinds)
        return {name: value for name, value in found.items() if value is not None}
