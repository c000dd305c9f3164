"""The steps of a session, in order of worth, and the process that one runs in."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from exporter.artifacts import GpuStep, SweepFailure
from exporter.errors import DepthcutError, first_line
from exporter.pipeline.gpu.attention import time_attention, time_last_logits
from exporter.pipeline.gpu.first_looks import check_numbers, look_at_card, run_tests
from exporter.pipeline.gpu.models import time_large_model, time_small_model
from exporter.pipeline.gpu.workplace import Order, Workplace
from exporter.pipeline.telling import work
from exporter.progress import Progress

WORKER = ("-P", "-m", "exporter.pipeline.gpu.steps")
"""How Python starts it; ``-P`` keeps it from importing what lies in the folder that it is called
in."""
_MINUTE_S = 60.0


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        title: What it does.
        limit_s: Seconds that it may take.
        run: Does it.
    """

    title: str
    limit_s: float
    run: Callable[[Workplace], None]


STEPS: Mapping[str, Step] = {
    "doctor": Step("The card, its memory's speed, the libraries", 5 * _MINUTE_S, look_at_card),
    "tests": Step("The tests that need a GPU", 15 * _MINUTE_S, run_tests),
    "numbers": Step("A decoder in place against ONNX Runtime", 10 * _MINUTE_S, check_numbers),
    "attention": Step("Attention by lengths against by mask", 10 * _MINUTE_S, time_attention),
    "logits": Step("Logits of the last position against all", 10 * _MINUTE_S, time_last_logits),
    "smollm2": Step("SmolLM2's shape, whole against cut", 10 * _MINUTE_S, time_small_model),
    "8b": Step(
        "Llama-3-8B's shape at its largest batch", 40 * _MINUTE_S,
        partial(time_large_model, name="Llama-3-8B"),
    ),
    "70b": Step(
        "Llama-3-70B's shape at its largest batch", 40 * _MINUTE_S,
        partial(time_large_model, name="Llama-3-70B"),
    ),
}  # fmt: skip
"""By name, in the order in which they run."""


@dataclass(frozen=True)
class StepJob:
    """A step's work as plain text, which its process takes up.

    Attributes:
        name: Of the step.
        folder: Where it works.
        order: What the session was asked for.
    """

    name: str
    folder: str
    order: Order

    def to_json(self) -> str:
        """As :meth:`from_json` takes it, on one line."""
        told = {"name": self.name, "folder": self.folder, "order": self.order.to_dict()}
        return json.dumps(told)

    @classmethod
    def from_json(cls, text: str) -> StepJob:
        """What :meth:`to_json` gave."""
        told = json.loads(text)
        return cls(told["name"], told["folder"], Order(**told["order"]))

    def missing(self) -> GpuStep:
        """The step that has no result yet."""
        title, rehearsal = STEPS[self.name].title, self.order.stand_in is not None
        return GpuStep(name=self.name, title=title, rehearsal=rehearsal)


def run_step(job: StepJob, progress: Progress) -> GpuStep:
    """Runs a step.

    Returns:
        Done or failed, with what was found by then: a failure is a result, and the others go on.
    """
    place = Workplace(Path(job.folder), job.order, progress)
    failure: SweepFailure | None = None
    status = "done"
    try:
        STEPS[job.name].run(place)
    except KeyboardInterrupt:
        status = "late"
    except DepthcutError as error:
        failure = _failure(error, error.message, error.hint)
    except MemoryError as error:
        failure = _failure(error, "The memory ran out.")
    except Exception as error:  # other steps may well go on
        traceback.print_exc()
        failure = _failure(error, f"Unexpected: {first_line(error)}.")
    status = "failed" if failure else status
    found = {"status": status, "failure": failure, **vars(place.found)}
    return job.missing().model_copy(update=found)


def _failure(error: Exception, message: str, hint: str = "") -> SweepFailure:
    return SweepFailure(error=type(error).__name__, message=message, hint=hint or None)


def _step(request: str, progress: Progress) -> dict[str, Any]:
    job = StepJob.from_json(request)
    if job.order.stand_in is not None:
        importlib.import_module(job.order.stand_in).install()
    return {"step": run_step(job, progress).model_dump(mode="json")}


if __name__ == "__main__":
    sys.exit(work(_step))
