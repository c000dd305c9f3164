"""The whole session: what is kept, what is run, and one page at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from exporter.artifacts import GpuSession, GpuStep, SweepFailure
from exporter.artifacts.ledger import FOLDER, locked
from exporter.artifacts.store import Store
from exporter.engines.build.driver import ask_driver
from exporter.engines.build.libraries import LIBRARIES, Backend, usual_backend
from exporter.errors import BackendError, UsageError
from exporter.files import write_text
from exporter.pipeline.children import ChildEnd, run_child
from exporter.pipeline.gpu.known import findings
from exporter.pipeline.gpu.steps import STEPS, WORKER, Step, StepJob
from exporter.pipeline.gpu.workplace import Order
from exporter.progress import QUIET, Progress
from exporter.report.files import session_files, write_session
from graph_passes.files.placing import remove_tree

_WORK = "gpu"


def usual_engine() -> Backend:
    """The library that serves the card, as builds choose it; the other where it is not there."""
    usual = usual_backend()
    found = [each for each in LIBRARIES.values() if importlib.util.find_spec(each.module)]
    names = [each.backend for each in found]
    return usual if usual in names or not names else names[0]


def run_session(
    out: Path,
    order: Order,
    *,
    names: Sequence[str] = tuple(STEPS),
    time_s: float | None = None,
    progress: Progress = QUIET,
) -> GpuSession:
    """Runs every step that is missing, and writes one page of all.

    A step that is done is kept while the order, the card and the libraries are as they were; one
    that was stopped goes on where it was. A file is written after each, and the page anew.

    Args:
        out: The folder for all results: session.json, session.md (rehearsal.json and rehearsal.md
            where no card is there), and steps/ with a file for each step.
        order: What the steps are told.
        names: Which steps.
        time_s: Seconds after which no step begins, and the one that runs is stopped; None: never.
        progress: Hears what goes on.

    Raises:
        BackendError: There is no card.
        UsageError: The folder holds a rehearsal, and this is none; or the other way round.
        OSError: The disk is full.
    """
    rehearsal = order.stand_in is not None
    if not rehearsal and (problem := ask_driver().problem):
        raise BackendError(
            f"{problem}: nothing was measured.",
            "Run it on a machine with an NVIDIA GPU and its driver.",
            code="no-driver",
        )
    _refuse_other(out, rehearsal=rehearsal)
    with locked(out):
        session = _Session(out, order, time_s, progress)
        for name in STEPS:
            if name in names:
                session.step(name)
        return session.report()


def _refuse_other(out: Path, *, rehearsal: bool) -> None:
    other = session_files(out, rehearsal=not rehearsal)[0]
    if other.exists():
        raise UsageError(
            f"{other} is there: a rehearsal and a session on a card must not be mixed.",
            "Use another folder.",
            code="rehearsal-mixed",
        )


@dataclass
class _Session:
    """The steps of one folder."""

    out: Path
    order: Order
    time_s: float | None
    progress: Progress

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        made_from = self.order.conditions()
        self._store = Store(self.out / FOLDER / "steps.jsonl", made_from, self.out.resolve())
        self._steps = {name: self._job(name).missing() for name in STEPS}
        for name in STEPS:
            self._take_kept(name)

    def _job(self, name: str) -> StepJob:
        return StepJob(name, str(self.out.resolve() / FOLDER / _WORK / name), self.order)

    def _file(self, name: str) -> Path:
        return self.out.resolve() / "steps" / f"{list(STEPS).index(name) + 1}-{name}.json"

    def _take_kept(self, name: str) -> None:
        """A step that is done, or what a stopped one had found."""
        with contextlib.suppress(ValidationError):
            if (told := self._store.find(name)) is not None:
                found = GpuStep.model_validate(told)
                # A session that had no folder of tests has run none; this one may have it.
                if name != "tests" or found.tests or self.order.tests is None:
                    self._steps[name] = found

    def step(self, name: str) -> None:
        """Runs a step, if it isn't done and there is time, and writes down what came of it."""
        step, left = STEPS[name], self._left_s()
        if self._steps[name].status == "done" or left <= 0:
            return
        number = list(STEPS).index(name) + 1
        self.progress.say(f"gpu-session: step {number} of {len(STEPS)}: {step.title} ...")
        found = self._run(name, step, min(step.limit_s, left))
        self._steps[name] = found
        write_text(self._file(name), found.to_json())
        self._store.keep(name, found.model_dump(mode="json"), files=[self._file(name)])
        write_session(self.report(), self.out)
        self.progress.say(f"gpu-session: {name} {_words(found)}")

    def _left_s(self) -> float:
        if self.time_s is None:
            return float("inf")
        return self.time_s - (time.monotonic() - self._begin)

    def _run(self, name: str, step: Step, limit_s: float) -> GpuStep:
        job, begin = self._job(name), time.monotonic()
        folder = Path(job.folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        end = run_child(WORKER, job.to_json(), self.progress, limit_s=limit_s, log=log)
        if "full" in end.word:
            raise OSError(end.word["errno"], os.strerror(end.word["errno"]), end.word["full"])
        found = _told(job, end)
        if found.status in ("done", "failed"):  # one that goes on needs its models and engines
            remove_tree(folder)
        if found.status == "done":
            folder.with_suffix(".jsonl").unlink(missing_ok=True)
        return found.model_copy(update={"seconds": time.monotonic() - begin})

    def report(self) -> GpuSession:
        """All steps as far as they are known."""
        steps = list(self._steps.values())
        rehearsal = self.order.stand_in is not None
        return GpuSession(rehearsal=rehearsal, steps=steps, findings=findings(steps))


def _told(job: StepJob, end: ChildEnd) -> GpuStep:
    """What a step's process has said, or how it has ended without a word."""
    if "step" in end.word:
        found = GpuStep.model_validate(end.word["step"])
        return found if found.status != "late" or end.late else _stopped(found)
    if end.late:
        return job.missing().model_copy(update={"status": "late"})
    message = f"The step's process {end.told}."
    failure = SweepFailure(error="EngineError", message=message, hint=end.hint)
    return job.missing().model_copy(update={"status": "failed", "failure": failure})


def _stopped(found: GpuStep) -> GpuStep:
    """Somebody has asked the step's process to end."""
    return found.model_copy(update={"status": "missing"})


def _words(step: GpuStep) -> str:
    if step.failure is not None:
        return f"FAILED: {step.failure.message}"
    if step.status == "late":
        return f"stopped after {step.seconds:.0f} s; it goes on when the command is run again"
    return f"{step.status} in {step.seconds:.0f} s"
