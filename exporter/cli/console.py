"""What is printed: results, and progress as bars where there is a terminal, else as lines."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.printable import printable, printable_json, printable_line, raw_output
from exporter.progress import QUIET as NOBODY
from exporter.progress import Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

BEGIN_AFTER_S = 10.0
PART_WORTH_TELLING_S = 20.0
LINE_EVERY_S = 20.0
LINE_EVERY_AT_MOST_S = 300.0
"""Some CI systems end what is silent for ten minutes."""


class TaskLines:
    """Writes what is going on as lines."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._open: list[_Counted] = []
        self._due = 0.0
        self._said_begin = False

    @property
    def open(self) -> bool:
        """Whether any piece of work is."""
        return bool(self._open)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets the log tick from a thread during the block: few tasks tell each step."""
        over = threading.Event()

        def tick() -> None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads the log any more
                while not over.wait(self.tick()):
                    pass

        thread = threading.Thread(target=tick, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def begin(self, description: str, total: int | None, unit: str = "") -> Task:
        """Opens a piece of work, as a part of the one that is open."""
        if not self._open:
            self._due, self._said_begin = self._clock() + BEGIN_AFTER_S, False
        self._open.append(_Counted(description, total, unit, self._clock()))
        return self._open[-1]

    def end(self, *, failed: bool) -> None:
        """Closes the one that was opened last."""
        task = self._open.pop()
        seconds = self._clock() - task.begin
        if not failed and (not self._open or seconds >= PART_WORTH_TELLING_S):
            self._say(f"{task.description}: done in {seconds:.1f} s")
        elif failed and not self._open and not self._said_begin:
            self._say(f"{task.description} ...")

    def tick(self) -> float:
        """Tells how far the work is, if that is due.

        The seconds until it is due again.
        """
        now, tasks = self._clock(), list(self._open)
        if not tasks:
            return BEGIN_AFTER_S
        if now < self._due:
            return self._due - now
        running_s = now - tasks[0].begin
        if self._said_begin:
            self._say(f"{'; '.join(task.words for task in tasks)}, after {running_s:.0f} s")
            pause = min(max(LINE_EVERY_S, running_s / 4), LINE_EVERY_AT_MOST_S)
        else:
            self._say(f"{tasks[0].description} ...")
            pause = max(LINE_EVERY_S - running_s, 0.0)
        self._said_begin = True
        self._due = now + pause
        return pause


class _Counted:
    def __init__(self, description: str, total: int | None, unit: str, begin: float) -> None:
        self.description, self.begin = description, begin
        self._unit = f" {unit}" if unit else ""
        self._of = "" if total is None else f" of {total}"
        self._done = 0

    def advance(self, steps: int = 1) -> None:
        """Counts."""
        self._done += steps

    @property
    def words(self) -> str:
        """What it is, and how far."""
        known = self._done or self._of
        return (
            f"{self.description}: {self._done}{self._of}{self._unit}" if known else self.description
        )


QUIET, NORMAL, VERBOSE = -1, 0, 1
CONFIG, SHOW_CONFIG, HELP_ALL = "config", "show_config", "help_all"
"""What ``ctx.meta`` holds of the options of every command."""


def echo(*lines: object, err: bool = False) -> None:
    """Prints lines; in none of them does a line break of a stranger's begin another."""
    for line in lines or ("",):
        click.echo(printable_line(str(line)), err=err)


def echo_json(text: str) -> None:
    """Prints JSON on standard output; a line break ends it."""
    click.echo(printable_json(text.rstrip("\n")))


def echo_command(line: str, *, err: bool = False) -> None:
    """Prints a line of our own that a CI system is to obey: foreign text in it is escaped."""
    stream = raw_output(sys.stderr if err else sys.stdout)
    stream.write(f"{line}\n")
    stream.flush()


class ConsoleProgress:
    """Tells on standard error what is going on; standard output is kept for results."""

    def __init__(self, verbosity: int = NORMAL) -> None:
        self.verbosity = verbosity
        self.as_json = False
        self.words: list[str] = []  # of the command line
        # Kept, since libraries that print too much run with sys.stderr redirected.
        self._stream = raw_output(sys.stderr)
        self._console: Console | None = None
        self._lines, self._bars = TaskLines(self.say), TaskBars(self)

    @property
    def console(self) -> Console:
        """The console on standard error, made on first use."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(
                file=self._stream, highlight=False, markup=False, emoji=False, soft_wrap=True
            )
        return self._console

    def say(self, message: str) -> None:
        """Prints a line unless quiet."""
        if self.verbosity >= NORMAL:
            self.console.print(printable_line(message))

    def detail(self, message: str) -> None:
        """Prints a line when verbose, or the lines that a library said."""
        if self.verbosity >= VERBOSE:
            self.console.print(printable(message), style="dim")

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
        """Shows a bar on a terminal; elsewhere a line at the end, and more where it takes long."""
        if self.verbosity < NORMAL:
            with NOBODY.task(description) as task:
                yield task
            return
        shown = self._bars if self._stream.isatty() else self._lines
        with ExitStack() as outermost:
            if not shown.open:
                outermost.enter_context(shown.running())
            failed, task = True, shown.begin(description, total, unit)
            try:
                yield task
                failed = False
            finally:
                shown.end(failed=failed)


class TaskBars(TaskLines):
    """Shows what is going on as bars on a terminal, and the same lines at the end."""

    def __init__(self, progress: ConsoleProgress) -> None:
        super().__init__(progress.say)
        self._progress = progress
        self._ids: list[TaskID] = []
        self._bars: Bars | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Draws during the block."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        text = TextColumn("{task.description}", markup=False)
        unit = TextColumn("{task.fields[unit]}", markup=False)
        columns = SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), unit
        console = self._progress.console
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as self._bars:
            yield

    def begin(self, description: str, total: int | None, unit: str = "") -> Task:
        """Opens a bar."""
        super().begin(description, total, unit)
        bars, words = self._bars, printable_line(description)
        assert bars is not None
        self._ids.append(bars.add_task(words, total=total, unit=printable_line(unit)))
        return _Bar(bars, self._ids[-1])

    def end(self, *, failed: bool) -> None:
        """Takes it away."""
        assert self._bars is not None
        self._bars.remove_task(self._ids.pop())
        self._bars.refresh()  # else a line is printed over bars as they were a moment ago
        super().end(failed=failed)


class _Bar:
    def __init__(self, bars: Bars, task_id: TaskID) -> None:
        self._bars = bars
        self._task_id = task_id

    def advance(self, steps: int = 1) -> None:
        """Moves the bar."""
        self._bars.advance(self._task_id, steps)


class TextPath(click.Path):
    """A path whose name is text: reports, ONNX Runtime and the builders take no other."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Refuses bytes that are no UTF-8, which Python has as lone surrogates.

        What a killed command left half in its place is completed before anybody looks for it.
        """
        name = os.fspath(value)
        if not name:
            self.fail("the name is empty (perhaps a variable is not set)", param, ctx)
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            self.fail(f"the name {name!a} is not UTF-8: rename it", param, ctx)
        if self.exists:
            from graph_passes.files.placing import finish_interrupted

            finish_interrupted(Path(name))
        return super().convert(value, param, ctx)


def general_options() -> list[click.Option]:
    """The options of every command, before its name or behind it."""

    def tell(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[HELP_ALL] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    def apply(ctx: click.Context, param: click.Parameter, value: object) -> None:
        progress = ctx.find_object(ConsoleProgress)
        if value and param.name in (CONFIG, SHOW_CONFIG):
            ctx.meta[param.name] = value
        elif not value or progress is None:
            return
        elif param.name == "json":
            progress.as_json = True
        else:
            progress.verbosity = QUIET if param.name == "quiet" else VERBOSE

    def made(*names: str, help: str, **how: Any) -> click.Option:  # noqa: A002
        how = {"is_flag": True, "callback": apply, **how}
        return click.Option(names, expose_value=False, help=help, **how)

    return [
        made("--json", help="Print the result as JSON on standard output."),
        made(
            "--config", type=TextPath(exists=True, dir_okay=False, path_type=Path), is_flag=False,
            metavar="FILE.yaml", help="Read options from a file; the command line overrides it.",
        ),
        made("--show-config", help="Print the settings as such a file, and exit."),
        made("-q", "--quiet", help="Print only results and errors."),
        made("-v", "--verbose", is_eager=True, help="Print details, and tracebacks on errors."),
        made("--help-all", is_eager=True, callback=tell, help="Show all options and keys."),
    ]  # fmt: skip
