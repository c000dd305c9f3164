"""Options that say by what importance is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from exporter.cli.options import scoring
from exporter.cli.sections import Count
from exporter.score.registry import DEFAULT, METRICS

_F = TypeVar("_F", bound=Callable[..., Any])
METRIC_NAMES = tuple(METRICS)


def metric_options(function: _F) -> _F:
    """Adds the choice of metrics, and what some of them want to know."""
    for option in (
        scoring(
            "--blocks", is_flag=True,
            help="Of kl and perplexity: score whole blocks as well; half as much work again.",
        ),
        scoring(
            "--kl-positions", type=Count(), default=2, show_default=True,
            help="Of kl and perplexity: look at the answers at every N-th token.",
        ),
        scoring(
            "--metric", "metrics", type=click.Choice(METRIC_NAMES), metavar="NAME",
            multiple=True, default=(DEFAULT,), show_default=True,
            help=f"What to score by: {', '.join(METRIC_NAMES)}. Repeatable; the first decides.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function
