"""Options of `depthcut score` that ask for a series: over checkpoints, or over texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from exporter.cli.options import Lengths
from exporter.cli.quality_options import Names
from exporter.cli.sections import option_in

_F = TypeVar("_F", bound=Callable[..., Any])

series = option_in("A series of scores")
SERIES = ("checkpoints", "revisions", "vary_calibration", "vary_samples")
"""The parameters that ask for one."""


def series_options(function: _F) -> _F:
    """Adds what is varied."""
    for option in (
        series(
            "--vary-samples", type=Lengths(), default=(),
            help="Score MODEL on each of these numbers of samples.",
        ),
        series(
            "--vary-calibration", metavar="SOURCE", multiple=True,
            help="Score MODEL on this text and on others, into the folder -o. Repeatable.",
        ),
        series(
            "--revisions", type=Names(), default=(),
            help="Score these revisions of a hub model, as checkpoints of its training.",
        ),
        series(
            "--checkpoints", is_flag=True,
            help="MODEL... are checkpoints of one training: their folders, a folder that holds "
            "them, or a pattern in quotes. Each is scored on the same text, into the folder -o.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def asks_for_series(options: Mapping[str, Any]) -> bool:
    """Whether any of them is given."""
    return any(options[name] for name in SERIES)


def without_series(options: Mapping[str, Any]) -> dict[str, Any]:
    """The other options."""
    return {name: value for name, value in options.items() if name not in SERIES}


def given_options() -> set[str]:
    """The parameters that stand on the command line."""
    context = click.get_current_context()
    given = click.core.ParameterSource.COMMANDLINE
    return {
        param.name
        for param in context.command.params
        if param.name and context.get_parameter_source(param.name) is given
    }
