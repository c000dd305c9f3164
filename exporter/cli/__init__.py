"""The command line: parses, calls one library function, prints. All exit codes are made here.

0: done. 1: failed. 2: the call was wrong. 130: interrupted. `depthcut check` has 1 for a regression
and 3 for not knowing; there 2 is every failure. So it is with `--require-speedup`, too.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence

import click

from exporter.cli.build import build
from exporter.cli.check import check
from exporter.cli.check_engine import check_engine
from exporter.cli.checkpoint import checkpoint
from exporter.cli.compare import compare
from exporter.cli.console import ConsoleProgress, echo
from exporter.cli.costs import costs
from exporter.cli.depths import depths
from exporter.cli.doctor import doctor
from exporter.cli.evaluate import evaluate
from exporter.cli.export import export
from exporter.cli.generate import generate
from exporter.cli.heal import heal
from exporter.cli.inspect import inspect
from exporter.cli.lm_eval import lm_eval
from exporter.cli.options import show_version
from exporter.cli.package import package
from exporter.cli.plan import plan
from exporter.cli.prune import prune
from exporter.cli.quantize import quantize
from exporter.cli.refit import refit
from exporter.cli.report import report
from exporter.cli.score import score
from exporter.cli.sections import SectionedGroup
from exporter.cli.stability import stability
from exporter.cli.sweep import sweep
from exporter.errors import (
    FULL_DISK,
    DepthcutError,
    SweepError,
    UsageError,
    first_line,
    panics_as_errors,
)
from exporter.printable import printable, printable_output

WRONG_CALL, INTERRUPTED = 2, 130


@click.group(
    cls=SectionedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=show_version,
    help="Print the version.",
)  # fmt: skip
def cli() -> None:
    """Cut the layers that don't matter out of a Transformer, and prove what that bought.

    `depthcut export` walks the whole road. The other commands are its stages, each usable alone.
    """


cli.add_sections(
    {
        "The whole road": [export, sweep],
        "Its stages": [score, plan, heal, prune, quantize, build, compare, report, check],
        "Studies": [stability, depths],
        "Tools": [
            inspect,
            costs,
            checkpoint,
            check_engine,
            refit,
            generate,
            evaluate,
            lm_eval,
            package,
            doctor,
        ],
    }
)


def main(args: Sequence[str] | None = None) -> None:
    """The ``depthcut`` command."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line and turns every end into an exit code."""
    progress = ConsoleProgress()
    signal.signal(signal.SIGTERM, _interrupt)
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
        return _fail(progress, str(error), WRONG_CALL, several=True)
    except UsageError as error:
        return _fail(progress, str(error), WRONG_CALL)
    except DepthcutError as error:
        return _fail(progress, str(error), progress.failure_code)
    except BrokenPipeError:
        # The reader of a pipe has gone: nobody is left to tell.
        sys.stderr.close()
        return progress.failure_code
    except OSError as error:
        return _fail(progress, _os_error_line(error), progress.failure_code)
    except MemoryError:
        return _fail(progress, "Out of memory.", progress.failure_code)
    except Exception as error:
        line = f"Unexpected {type(error).__name__}: {first_line(error)} (-v shows the traceback)"
        return _fail(progress, line, progress.failure_code)
    return code if isinstance(code, int) else 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(progress: ConsoleProgress, line: str, code: int, *, several: bool = False) -> int:
    """Tells why, in a line; ``several`` are told of a sweep's file, one for each mistake."""
    if progress.verbosity > 0 and code == progress.failure_code:
        click.echo(printable(traceback.format_exc()), err=True)
    told = f"depthcut: {line}"
    echo(*(told.split("\n") if several else [told]), err=True)
    return code


def _os_error_line(error: OSError) -> str:
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in FULL_DISK:
        return f"The disk is full{where}. Free some space and run the command again."
    return f"{error.strerror or error}{where}."
