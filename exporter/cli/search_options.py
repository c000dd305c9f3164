"""Options that say how what to drop is searched for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.cli.options import dropping
from exporter.cli.sections import Count

if TYPE_CHECKING:
    from exporter.choose.selection import SearchOptions

_F = TypeVar("_F", bound=Callable[..., Any])
# As exporter.choose.selection has them, which --help must not load.
_SEARCHES = ("one-shot", "iterative", "greedy", "evolution")


def search_options(function: _F) -> _F:
    """Adds how the sublayers are chosen, and what must stay."""
    for option in (
        dropping(
            "--search-seed", type=int, metavar="N", default=0, show_default=True,
            help="Of --search evolution: seed of the swaps.",
        ),
        dropping(
            "--search-seconds", type=Count(), default=600, show_default=True,
            help="Of --search evolution: time for swaps.",
        ),
        dropping(
            "--search-tokens", type=Count(2), default=4096, show_default=True,
            help="Of --search greedy and evolution: tokens of the calibration text that a choice "
            "is measured on.",
        ),
        dropping(
            "--shortlist", type=Count(0), default=12, show_default=True,
            help="Of --search greedy and evolution: candidates that are measured at a step; 0 for "
            "all.",
        ),
        dropping(
            "--rescore-every", type=Count(), default=1, show_default=True,
            help="Of --search iterative: drops between two scorings.",
        ),
        dropping(
            "--protect", multiple=True, metavar="WHAT",
            help="What must stay: first, last, or kind:layers such as attention:0,29. Repeatable.",
        ),
        dropping(
            "--objective", type=click.Choice(["kl", "perplexity"]), default="kl",
            show_default=True,
            help="Of --search greedy and evolution: the damage that is kept small.",
        ),
        dropping(
            "--search", type=click.Choice(_SEARCHES),
            help="one-shot: the lowest scores. iterative: scored again after each drop. greedy: "
            "the least added damage at each step. evolution: greedy, then swaps. [one-shot; "
            "greedy for budgets that are more than numbers]",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def search_request(options: Mapping[str, Any]) -> SearchOptions:
    """The library's own options."""
    from exporter.choose.selection import SearchOptions

    return SearchOptions(
        search=options["search"],
        objective=options["objective"],
        protect=options["protect"],
        every=options["rescore_every"],
        shortlist=options["shortlist"],
        tokens=options["search_tokens"],
        seconds=float(options["search_seconds"]),
        seed=options["search_seed"],
    )
