"""`depthcut gpu-session`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.errors import UsageError
from exporter.option_types import Duration, Engine, InputFolder, Names, Written
from exporter.options import Options, argument, dataclass, option

_Steps = Annotated[Names, Written("STEP,STEP", ",".join, listed=True)]


@dataclass(frozen=True, kw_only=True)
class GpuSessionCall(Options):
    """What `depthcut gpu-session` is asked to do."""

    folder: Path = argument("DIR")
    engine: Engine | None = option(
        None, "Which library to measure.", usual="the one that depthcut build takes"
    )
    tests: InputFolder | None = option(
        None, "Folder of the tests that need a GPU: tests/gpu of a clone.", usual="no tests"
    )
    steps: _Steps = option((), "Run only these steps.", usual="all")
    time_s: Duration | None = option(
        None,
        "Maximum time: no step begins after it, and the one that runs is stopped. The same command "
        "resumes.",
        "--time",
        usual="no limit",
    )


@command(GpuSessionCall, name="gpu-session")
def gpu_session(call: GpuSessionCall, progress: ConsoleProgress) -> int:
    """The first hour on an NVIDIA GPU: measure engines in order of worth, write one page to DIR.

    Each step runs in a process of its own, for a limited time, and leaves a file: doctor, tests,
    numbers, attention, logits, smollm2, 8b, 70b. Models have random weights; nothing is downloaded.
    Finished steps are kept, and a stopped step goes on where it was. DIR takes session.md,
    session.json and steps/. Without a GPU nothing is measured. Exit code 2 if a step failed, 3 if
    one of those that were asked for is still to run.
    """
    from exporter.pipeline.gpu.session import run_session, usual_engine
    from exporter.pipeline.gpu.steps import STEPS
    from exporter.pipeline.gpu.workplace import Order
    from exporter.report.files import session_files

    if unknown := next((name for name in call.steps if name not in STEPS), None):
        raise UsageError(f"There is no step {unknown}.", f"There are {', '.join(STEPS)}.")
    order = Order(
        engine=call.engine or usual_engine(),
        tests=None if call.tests is None else str(call.tests.resolve()),
    )
    names = call.steps or tuple(STEPS)
    session = run_session(call.folder, order, names=names, time_s=call.time_s, progress=progress)
    if progress.as_json:
        echo_json(session.to_json())
    else:
        rows = [(step.title, step.status, f"{step.seconds:.0f} s") for step in session.steps]
        print_rows(("step", "status", "time"), rows)
        echo(f"Page: {session_files(call.folder, rehearsal=session.rehearsal)[1]}")
    statuses = {step.status for step in session.steps if step.name in names}
    return 2 if "failed" in statuses else 3 if statuses != {"done"} else 0
