"""Options of the commands that judge a model's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])


def quality_options(function: _F) -> _F:
    """Adds what is measured of the answers, beside the distributions on the evaluation text."""
    for option in (
        click.option(
            "--stride", type=click.IntRange(min=1),
            help="Let samples of the evaluation text overlap: each begins N tokens after the last,"
            " so that tokens are predicted from more context.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function
