"""The command line: parses, calls one library function, prints. All exit codes are made here."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click
from click.exceptions import NoSuchCommand

from exporter import __version__
from exporter.cli.console import NORMAL, ConsoleProgress, echo, general_options
from exporter.errors import (
    DepthcutError,
    DisturbedMachineError,
    SweepError,
    UndecidedGoalError,
    UnmetGoalError,
    UsageError,
    panics_as_errors,
    plain_words,
)
from exporter.printable import printable, printable_output

NO, FAILED, UNDECIDED, INTERRUPTED = 1, 2, 3, 130
_COMMANDS = {
    "Everything in one command": {
        "export": ("export", "Score, cut, export to ONNX and compare, in one command."),
        "sweep": ("export", "Export and compare many models, plans and precisions."),
    },
    "Its steps, each usable alone": {
        "score": ("score", "Measure how redundant each attention, MLP and block is."),
        "plan": ("export", "Choose what to drop: by scores, by a search, for a budget."),
        "heal": ("heal", "Recover quality: fit replacements, or train kept weights."),
        "prune": ("prune", "Cut sublayers out of an ONNX file."),
        "quantize": ("prune", "Quantise the weights of an ONNX file."),
        "build": ("build", "Build an engine from an ONNX file."),
        "compare": ("compare", "Compare two models: speed, accuracy, size."),
        "report": ("tools", "Render saved reports again; nothing is measured."),
        "check": ("check", "Check a report against limits: a gate for CI."),
    },
    "Studies": {
        "depths": ("studies", "Drop several numbers of sublayers in four ways; one table."),
    },
    "Tools": {
        "inspect": ("prune", "List what could be cut out of an ONNX file."),
        "costs": ("studies", "Measure the time of each attention and MLP in a request."),
        "gguf": ("heal", "Cut sublayers out of a GGUF file, for llama.cpp."),
        "checkpoint": ("heal", "Write the pruned model as a Hugging Face checkpoint."),
        "verify-engine": ("tools", "Compare an engine's answers with ONNX Runtime's."),
        "generate": ("compare", "Continue a text with a model or an engine."),
        "chat": ("chat", "Talk to a model and its cut, side by side."),
        "evaluate": ("compare", "Score a model on tasks with correct answers."),
        "lm-eval": ("tools", "Run lm-eval's command line on depthcut's models."),
        "package": ("build", "Pack a model for serving."),
        "doctor": ("tools", "Show what this machine can do."),
    },
}
"""By headings, with the module, loaded when it is asked for, and what each does."""


_Resolved = tuple[str | None, click.Command | None, list[str]]


class _Commands(click.Group):
    """The commands under their headings."""

    def list_commands(self, ctx: click.Context | None = None) -> list[str]:
        """Their names, in the order of the help."""
        return [name for commands in _COMMANDS.values() for name in commands]

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """Loads a command."""
        for commands in _COMMANDS.values():
            if cmd_name in commands and cmd_name not in self.commands:
                module = importlib.import_module(f"{__name__}.{commands[cmd_name][0]}")
                self.commands[cmd_name] = getattr(module, cmd_name.replace("-", "_"))
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> _Resolved:
        """A command by its name; one that isn't there is answered with what may be meant."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise NoSuchCommand(args[0], possibilities=self.list_commands(), ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes its own options, those of every command, and the commands."""
        records = [param.get_help_record(ctx) for param in self.get_params(ctx)]
        version, *general = filter(None, records)
        with formatter.section("Options"):
            formatter.write_dl([version])
        with formatter.section("Options of every command, before its name or behind it"):
            formatter.write_dl(general)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes each heading's commands."""
        width = max(map(len, self.list_commands()))
        for title, commands in _COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name.ljust(width), does) for name, (_, does) in commands.items()]
                )


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="depthcut %(version)s", help="Print the version.")
def cli() -> None:
    """Remove the layers that matter least from a Transformer; measure what is gained and lost.

    `depthcut export` does every step; most of the other commands do one.
    """


cli.params += general_options()


def main(args: Sequence[str] | None = None) -> None:
    """The ``depthcut`` command."""
    code = run(args)
    gc.freeze()  # what is left goes with the process: Python need not look through it first
    sys.exit(code)


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line and turns every end into an exit code."""
    progress = ConsoleProgress()
    progress.words = [*(sys.argv[1:] if args is None else args)]
    _stop_on_signals(progress)
    with printable_output():
        return _run(args, progress)


def _run(args: Sequence[str] | None, progress: ConsoleProgress) -> int:
    try:
        # click itself catches ctx.exit(code), and gives the code back.
        with panics_as_errors():
            code = cli.main(args=args, obj=progress, prog_name="depthcut", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail(progress, "Interrupted. No result is half-written.", INTERRUPTED)
    except SweepError as error:
        echo(*f"depthcut: {error}".split("\n"), err=True)  # a line for each mistake in the file
        return FAILED
    except UsageError as error:
        echo(f"depthcut: {error}", err=True)
        return FAILED
    except DepthcutError as error:
        code = NO if isinstance(error, UnmetGoalError) else FAILED
        undecided = isinstance(error, UndecidedGoalError | DisturbedMachineError)
        return _fail(progress, str(error), UNDECIDED if undecided else code)
    except BrokenPipeError:
        # The reader of a pipe has gone: nobody is left to tell.
        sys.stderr.close()
        return FAILED
    except Exception as error:
        return _fail(progress, plain_words(error))
    return code if isinstance(code, int) else 0


def _stop_on_signals(progress: ConsoleProgress) -> None:
    """Lets Ctrl-C and SIGTERM interrupt, and say so at once: what runs may take seconds to stop."""

    def interrupt(_signal: int, _frame: object) -> None:
        if progress.verbosity >= NORMAL:
            with contextlib.suppress(OSError):  # not by the stream, which may be in use
                os.write(2, b"\nStopping ...\n")
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else nohup ignores it
        signal.signal(signal.SIGINT, interrupt)


def _fail(progress: ConsoleProgress, line: str, code: int = FAILED) -> int:
    if progress.verbosity > 0 and code == FAILED:
        click.echo(printable(traceback.format_exc()), err=True)
    echo(f"depthcut: {line}", err=True)
    return code
