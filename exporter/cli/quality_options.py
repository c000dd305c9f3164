"""Options of the commands that judge a model's answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from exporter.cli.options import EXISTING_DIRECTORY, Lengths, accuracy
from exporter.cli.sections import Count, option_in

_F = TypeVar("_F", bound=Callable[..., Any])

tasks = option_in("Tasks")


class Names(click.ParamType[tuple[str, ...]]):
    """Names, separated by commas: ``arc_easy,piqa``."""

    name = "NAME,NAME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Reads the list, each name once; a value from code passes."""
        if isinstance(value, tuple):
            return value
        names = [part.strip() for part in str(value).split(",")]
        if not all(names):
            self.fail(f"{value!r} is not a list of names such as arc_easy,piqa", param, ctx)
        return tuple(dict.fromkeys(names))


def task_options(*, required: bool = False) -> Callable[[_F], _F]:
    """Adds which tasks a model is scored on."""

    def add(function: _F) -> _F:
        for option in (
            tasks(
                "--task-limit", type=Count(), help="Only the first items of each."
            ),
            tasks(
                "--task-data", type=EXISTING_DIRECTORY, metavar="DIR",
                help="Take the tasks from DIR/NAME.jsonl, without lm-eval and the network.",
            ),
            tasks(
                "--tasks", type=Names(), default=(), required=required,
                help="Tasks with right answers: lm-eval's by name (from the Hugging Face hub), or"
                " those of --task-data.",
            ),
        ):  # fmt: skip
            function = option(function)
        return function

    return add


def quality_options(function: _F) -> _F:
    """Adds what is measured of the answers, beside the distributions on the evaluation text."""
    for option in (
        accuracy(
            "--long-context", type=Lengths(), default=(),
            help="Look for hidden facts in contexts of these lengths, and predict their ends.",
        ),
        accuracy(
            "--agreement-tokens", type=Count(), default=64, show_default=True,
            help="Tokens that both arms generate from each prompt.",
        ),
        accuracy(
            "--agreement-prompts", type=Count(0), default=8, show_default=True,
            help="Beginnings of the evaluation text that both arms continue greedily.",
        ),
        accuracy(
            "--stride", type=Count(),
            help="Let samples of the evaluation text overlap: each begins N tokens after the last,"
            " so that tokens are predicted from more context.",
        ),
    ):  # fmt: skip
        function = option(function)
    return task_options()(function)
