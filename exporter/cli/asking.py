"""What is asked on a terminal: lines of a chat, and which of several commands comes next."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence

from exporter.cli.console import NORMAL, ConsoleProgress, echo
from exporter.printable import printable_line, raw_output

Step = tuple[str, Sequence[str]]
"""What a command does, and its words."""


def can_ask(progress: ConsoleProgress) -> bool:
    """Whether somebody typed the command, not a script, and wants more than results."""
    # A shell makes what is typed the leader of a group of processes; a script's is in its group.
    typed = sys.stdin.isatty() and sys.stdout.isatty() and os.getpgrp() == os.getpid()
    return (
        typed and not progress.as_json and progress.verbosity >= NORMAL and "CI" not in os.environ
    )


def offer(question: str, steps: Sequence[Step], progress: ConsoleProgress) -> None:
    """Runs the commands that are picked, until one fails or asks by itself what comes next."""
    while (number := choose(question, [does for does, _ in steps], progress)) is not None:
        words = steps[number][1]
        if run_words(words) or "--checkpoint" in words:
            return


def run_words(words: Sequence[str]) -> int:
    """Shows a command, and runs it."""
    from exporter.cli import run

    echo(f"$ {shlex.join(['depthcut', *words])}")
    return run(words)


def choose(question: str, answers: Sequence[str], progress: ConsoleProgress) -> int | None:
    """The number of the answer that is picked by arrow or digit; None for none of them.

    Nothing is asked where nobody could answer.
    """
    if not answers or not can_ask(progress):
        return None
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import choice

    lines = ["nothing", *answers]
    options = [(number, printable_line(line)) for number, line in enumerate(lines)]
    with create_app_session(output=create_output(raw_output(sys.stdout))):
        try:
            number = choice(printable_line(question), options=options)
        except (KeyboardInterrupt, EOFError):
            return None
    return number - 1 if number else None


def lines_of_user(progress: ConsoleProgress) -> Iterator[str]:
    """Lines that somebody types, with those before them behind the arrows; or those of a pipe."""
    if not can_ask(progress):
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession(output=create_output(raw_output(sys.stdout)))
    while True:
        try:
            yield session.prompt("> ")
        except (KeyboardInterrupt, EOFError):
            return
