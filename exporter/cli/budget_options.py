"""Options that say what a plan has to hold: sizes, times, quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from exporter.cli.check_options import Share
from exporter.cli.options import Size
from exporter.cli.sections import Count, option_in
from graph_passes.types import BLOCK_KINDS, SublayerKind

if TYPE_CHECKING:
    from exporter.artifacts import HealKind
    from exporter.choose.budgets import Budget

_F = TypeVar("_F", bound=Callable[..., Any])
# As exporter.choose.budgets has them, which --help must not load.
_HEALS = ("none", "bias", "linear", "best")

budgeting = option_in("What to reach")
BUDGETS = (
    *("parameters", "fits", "target_speedup", "max_perplexity_increase", "min_top1_agreement"),
)
"""The options that ask for something that no number of sublayers says."""
IDLE = ("at", "require_speedup", "sequences", "context", "kinds", "attention_only")
"""What a choice by scores alone has no use for."""

TIMING = ("provider", "threads", "time_budget")
"""What it has no use for where nothing is timed."""


class Tokens(click.ParamType[int]):
    """A number of tokens: ``32k`` or ``32768``."""

    name = "TOKENS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads it; a number from code passes."""
        if isinstance(value, int):
            return value
        from exporter.choose.budgets import tokens
        from exporter.errors import UsageError

        try:
            return tokens(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Request(click.ParamType[Any]):
    """A request: ``batch=1,prompt=512,new=128``."""

    name = "REQUEST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Reads it; one from code passes."""
        if not isinstance(value, str):
            return value
        from exporter.choose.costs import At
        from exporter.errors import UsageError

        try:
            return At.parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Kinds(click.ParamType[tuple[str, ...]]):
    """Kinds of sublayers: ``attention,mlp``."""

    name = "KIND,KIND"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Reads them; a tuple from code passes."""
        if isinstance(value, tuple):
            return value
        named = tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))
        if not set(named) <= set(BLOCK_KINDS):
            self.fail(f"{value!r} is not made of {' and '.join(BLOCK_KINDS)}", param, ctx)
        return named


def budget_options(function: _F) -> _F:
    """Adds what a plan has to hold; budgets combine, and all of them hold."""
    for option in (
        budgeting(
            "--attention-only", is_flag=True, help="The same as --kinds attention."
        ),
        budgeting(
            "--kinds", type=Kinds(), help="Which sublayers may go. [attention,mlp]",
        ),
        budgeting(
            "--min-top1-agreement", type=Share(),
            help="Share of positions at which both models must think the same token the "
            "likeliest, such as 0.95.",
        ),
        budgeting(
            "--max-perplexity-increase", type=Share(),
            help="The most that the perplexity may rise, such as 5%. On tokens that the search "
            "does not see; used up for speed where --at is given, else for parameters.",
        ),
        budgeting(
            "--at", type=Request(),
            help="The request whose time counts, such as batch=1,prompt=512,new=128.",
        ),
        budgeting(
            "--require-speedup", is_flag=True,
            help="End with exit code 1 where the plan's measured speedup misses --target-speedup, "
            "and with 3 where the measurement can't tell; the results are written all the same. A "
            "failure is 2.",
        ),
        budgeting(
            "--target-speedup", type=float, metavar="X",
            help="How many times as fast that request is to be, measured to within 3 %.",
        ),
        budgeting(
            "--sequences", type=Count(),
            help="Of --fits: sequences whose caches are held. [1]",
        ),
        budgeting(
            "--context", type=Tokens(),
            help="Of --fits: tokens in the caches of every sequence, such as 32k.",
        ),
        budgeting(
            "--fits", type=Size(),
            help="Bytes that weights and caches may take together, such as 8GB.",
        ),
        budgeting(
            "--parameters", type=Share(),
            help="Share of the parameters to remove, such as 10%.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def replacement_options(function: _F) -> _F:
    """Adds what a planner may put in the place of what it drops."""
    for option in (
        budgeting(
            "--check-text", metavar="SOURCE",
            help="Text of another domain, on which a budget's plan is judged too. [pydoc, or self "
            "when calibrated on pydoc]",
        ),
        budgeting(
            "--rank", type=Count(), metavar="N",
            help="Rank of linear replacements. [full]",
        ),
        budgeting(
            "--heal", type=click.Choice(_HEALS),
            help="What may take a branch's place, fitted on the calibration text; best: none, "
            "bias or linear, whichever costs least for what it gains. [best for budgets that are "
            "more than numbers, else none]",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def asks_for_budget(options: Mapping[str, Any]) -> bool:
    """Whether a plan is asked for that no ranking of scores gives."""
    return any(options.get(name) is not None for name in BUDGETS)


def refuse_idle(options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuses options of the planner where nothing asks for it.

    Raises:
        UsageError: One was given.
    """
    from exporter.errors import UsageError

    for name in names:
        if options[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} is for budgets that are more than numbers.",
                "Say what to reach, such as --target-speedup 1.25 or --parameters 10%.",
            )


def asked_heal(options: Mapping[str, Any]) -> HealKind | None:
    """What may take a branch's place; where nothing is said, numbers alone are the paper's way."""
    kind: str | None = options["heal"]
    if kind is None and (asks_for_budget(options) or _asks_for_front_alone(options)):
        kind = "best"
    return None if kind in (None, "none") else cast("HealKind", kind)


def _asks_for_front_alone(options: Mapping[str, Any]) -> bool:
    counts = ("attention", "mlp", "block", "joint")
    return options.get("curve") is not None and not any(options[name] for name in counts)


def budget_request(options: Mapping[str, Any]) -> Budget:
    """The library's own budget, alike in `plan` and `export`.

    Args:
        options: click's.

    Raises:
        UsageError: Parts of it are lacking, or say nothing that makes sense.
    """
    from exporter.choose.budgets import Budget, Floors, Memory
    from exporter.errors import UsageError

    counts = {name: options[name] or 0 for name in ("attention", "mlp", "block", "joint")}
    fits, context = options["fits"], options["context"]
    kinds: tuple[SublayerKind, ...] | None = options["kinds"]
    if (fits is None) != (context is None):
        raise UsageError(
            "How much memory caches take depends on what they hold.",
            "Give --fits and --context together: --fits 8GB --context 32k --sequences 4.",
        )
    if options["sequences"] and fits is None:
        raise UsageError(
            "--sequences says how many caches --fits is for.", "Give both, or neither."
        )
    if options["require_speedup"] and options["target_speedup"] is None:
        raise UsageError("--require-speedup is for --target-speedup.", "Give both, or neither.")
    if kinds is not None and options["attention_only"]:
        raise UsageError("--kinds and --attention-only say the same.", "Give one of them.")
    return Budget(
        **counts,
        parameters=options["parameters"],
        fits=None if fits is None else Memory(fits, context, options["sequences"] or 1),
        target_speedup=options["target_speedup"],
        at=options["at"],
        floors=Floors(options["max_perplexity_increase"], options["min_top1_agreement"]),
        kinds=("attention",) if options["attention_only"] else kinds or BLOCK_KINDS,
    )
