"""Trains a student until its tokens or its time are used up, or held-out text gains no more."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from exporter.artifacts import StoppedBy, Training, TrainingCheck
from exporter.artifacts.store import Store
from exporter.errors import HealingError
from exporter.heal.distill.kept_arrays import moments_of, named, tensor_like
from exporter.heal.distill.rate import rate_groups, rate_share, usual_rate
from exporter.heal.distill.schedule import Schedule
from exporter.heal.distill.student import Student
from exporter.heal.distill.teacher import Lesson, Teacher
from exporter.heal.distill.workers import Workers
from exporter.heal.memory import telling_memory
from exporter.heal.options import HealOptions
from exporter.models.ablation.meter import Judged, predicts_tokens
from exporter.models.bfloat16 import bfloat16_where_fast
from exporter.models.idle_threads import IDLE_THREADS
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress

_MOST_CHECKS, _FEWEST_CHECKS = 10, 3
_TOKENS_PER_CHECKED = 4
"""Held-out text is looked at so often that it is a quarter of what is trained on, within limits."""
_PATIENCE = 3
_LEAST_GAIN = 0.002
"""Of the held-out loss; checks in a row that gain less end the training."""
_HALF = 0.5
"""Before that no training ends for want of a gain: most comes when the learning rate falls."""
_LOST = 2
_FAR = 2.0
"""So many checks in a row, each with so many times the bare cut's loss: the training diverges."""
_LONGEST_GRADIENT = 1.0
_SAVE_EVERY_S = 60.0
_SHARE_FOR_SAVING = 0.05


@dataclass
class _State:
    """Where a training stands; what an interrupted one goes on from.

    Attributes:
        steps: How many were made.
        seconds: What they took, the checks included.
        best_loss: The least on held-out text so far.
        best: The student's tensors then.
        checks: What was seen of held-out text.
    """

    steps: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    checks: list[TrainingCheck] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        """Whether the last checks gained nothing worth telling."""
        losses = [check.held_out_loss for check in self.checks]
        if len(losses) <= _PATIENCE:
            return False
        return min(losses[-_PATIENCE:]) > min(losses[:-_PATIENCE]) * (1 - _LEAST_GAIN)

    @property
    def diverges(self) -> bool:
        """Whether the last checks were far worse than the bare cut."""
        losses = [check.held_out_loss for check in self.checks if check.tokens]
        far = _FAR * self.checks[0].held_out_loss
        return len(losses) >= _LOST and min(losses[-_LOST:]) > far


class Trainer:
    """One training of one student.

    Args:
        student: Whose weights are trained.
        text: The samples to train on, in their order, several times where they are few.
        held_out: The samples that decide when to stop and which state is kept.
        options: How.
        store: Keeps the state of an interrupted training; None keeps nothing.
        progress: Told of every step and check.
    """

    def __init__(
        self,
        student: Student,
        text: CalibrationText,
        held_out: CalibrationText,
        options: HealOptions,
        store: Store | None = None,
        progress: Progress = QUIET,
    ) -> None:
        self._student, self._options, self._progress = student, options, progress
        self._text, self._store = text, store
        self._stopped_on = held_out.ref
        self._workers = Workers()
        self._schedule = schedule = Schedule(text, options, self._workers.count)
        self._step_tokens, self._total_steps = schedule.step_tokens, schedule.total_steps
        states = _states_weight(student, options)
        self._teacher = Teacher(student, keeps=schedule.reads_steps_again, states=states)
        self._judges = Lesson.of(held_out, options.batch_size)
        wanted = self._total_steps * self._step_tokens / _TOKENS_PER_CHECKED
        often = int(wanted / held_out.mask.sum())
        self._checks = min(_MOST_CHECKS, max(_FEWEST_CHECKS, often))
        self._judge = Teacher(student, keeps=True)
        self._tensors = student.trained
        self._optimizer = torch.optim.AdamW(
            rate_groups(self._tensors, student.replacing, options.train),
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self._rate = 0.0
        self._state, self._done, self._check_s = _State(), 0.0, 0.0
        self._saved_at, self._saves = time.monotonic(), 0

    def run(self) -> Training:
        """Trains, and leaves the best state in the student.

        Raises:
            HealingError: The healed cut is no better on held-out text than the unhealed one, or
                memory is short.
        """
        with (
            telling_memory(self._options),
            self._progress.task("distill", total=self._total_steps, unit="steps") as task,
        ):
            self._resume()
            task.advance(self._state.steps)
            self._begin()
            stopped: StoppedBy | None = None
            while stopped is None:
                stopped = self._go_on()
                task.advance()
        unhealed = self._state.checks[0].held_out_loss
        if not self._state.best_loss < unhealed:
            much = self._text.read.much
            raise HealingError(
                f"Distillation gained nothing: on held-out {much} the loss is {unhealed:.4g} "
                f"before and {self._state.checks[-1].held_out_loss:.4g} after.",
                f"Give more tokens or time, a lower learning_rate, or other {much}.",
                code="distillation-gained-nothing",
            )
        self._take_best()
        return self._told(stopped)

    def _begin(self) -> None:
        """Checks the bare cut and what was fitted, and drops that if it gains nothing."""
        checks = self._state.checks
        resumed = bool(checks)
        if not resumed:
            with self._student.bare():
                self._check(0.0)
            if self._student.is_fitted:
                self._check(0.0)
        if len(checks) > 1 and checks[1].held_out_loss >= checks[0].held_out_loss:
            self._student.begin_bare(empties=not resumed)
        begins = min(each.held_out_loss for each in checks if not each.tokens)
        near = self._workers.from_first(self._judge.nearness(begins, self._judges))
        self._rate = self._options.learning_rate or usual_rate(
            self._options.train, near, encodes=self._teacher.judged != "tokens"
        )

    def _go_on(self) -> StoppedBy | None:
        """One step, with a check where one is due; why the training ends, if it does."""
        began = time.monotonic()
        try:
            loss, done = self._workers.from_first((self._step(), self._fraction(began)))
            self._done = done
            if not math.isfinite(loss):
                self._progress.say("heal: the loss is no longer finite; the best state is kept")
                return "diverged"
            if done >= 1 or self._is_check_due(done):
                self._check(loss, began)
                if self._state.diverges:
                    self._progress.say("heal: the loss only grows; the best state is kept")
                    return "diverged"
        finally:
            self._state.seconds += time.monotonic() - began
        if done >= 1:
            return "tokens" if self._state.steps >= self._total_steps else "time"
        if done >= _HALF and self._state.idle:
            return "no_gain"
        self._save_sometimes()
        return None

    def _fraction(self, began: float | None = None) -> float:
        """How much of the training is done, by tokens or by time, whichever is further; 0 to 1."""
        found: float = self._state.steps / self._total_steps
        if self._options.time_s is not None:
            more = 0.0 if began is None else time.monotonic() - began
            # The last check is within the time, too.
            steps_s = max(self._options.time_s - self._check_s, self._options.time_s / 2)
            found = max(found, (self._state.seconds + more) / steps_s)
        return min(1.0, found)

    def _is_check_due(self, done: float) -> bool:
        made = sum(check.tokens > 0 for check in self._state.checks)
        return bool(done * self._checks >= made + 1)

    def _step(self) -> float:
        """One step of the optimizer; the loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * group["share"] * rate_share(self._done)
        IDLE_THREADS.fit()
        lesson = self._lesson(self._state.steps)
        answers = self._teacher.answers(lesson)
        with self._student.healed():
            self._optimizer.zero_grad(set_to_none=True)
            with bfloat16_where_fast(self._student.model.device):
                given = self._student.answer(
                    lesson.inputs(self._student.model.device), states=self._teacher.wants_states
                )
                loss = self._teacher.loss(given, answers, lesson)
            loss.backward()  # type: ignore[no-untyped-call]
            tensors = [each for each in self._tensors.values() if each.grad is not None]
            self._workers.average(each.grad for each in tensors if each.grad is not None)
            length = torch.nn.utils.clip_grad_norm_(tensors, _LONGEST_GRADIENT)
            usable = bool(length.isfinite())  # in all processes, or in none
            if usable:
                self._optimizer.step()
        self._state.steps += 1
        return float(loss.detach()) if usable else math.nan

    def _lesson(self, step: int) -> Lesson:
        """This process's share of a step's samples."""
        return Lesson.of_rows(self._text, list(self._workers.share(self._schedule.rows(step))))

    def _check(self, loss: float, began: float | None = None) -> None:
        """Looks at held-out text, and keeps the state if it is the best so far."""
        started = time.monotonic()
        held_out = self._workers.from_first(self._held_out_loss())
        self._check_s = time.monotonic() - started
        state = self._state
        seconds = state.seconds + (0.0 if began is None else time.monotonic() - began)
        tokens = state.steps * self._step_tokens
        state.checks.append(
            TrainingCheck(
                tokens=tokens, seconds=seconds, training_loss=loss, held_out_loss=held_out
            )
        )
        if held_out < state.best_loss:
            state.best_loss = held_out
            state.best = {name: each.clone() for name, each in self._values().items()}
        self._progress.say(self._words(tokens, seconds, held_out))

    def _words(self, tokens: int, seconds: float, held_out: float) -> str:
        first = self._state.checks[0].held_out_loss
        if not tokens:
            state = "of what was fitted" if len(self._state.checks) > 1 else "of the bare cut"
            return f"heal: {self._seen(held_out)} {state}, before the training"
        left = seconds * (1 / max(1e-9, self._done) - 1)
        return (
            f"heal: {tokens:,} of {self._total_steps * self._step_tokens:,} tokens, "
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s, about {left / 60:.1f} min left; "
            f"{self._seen(held_out)} ({100 * (1 - held_out / first):.0f} % recovered)"
        )

    def _seen(self, held_out: float) -> str:
        if self._teacher.judged == "embeddings":
            return f"held-out mean cosine {1 - held_out:.4f}"
        return f"held-out loss {held_out:.4f}"

    def _held_out_loss(self) -> float:
        total = weights = 0.0
        for lesson in self._judges:
            answers = self._judge.answers(lesson)
            with (
                self._student.healed(),
                torch.no_grad(),
                bfloat16_where_fast(self._student.model.device),
            ):
                given = self._student.answer(
                    lesson.inputs(self._student.model.device), states=self._judge.wants_states
                )
                loss = float(self._judge.loss(given, answers, lesson))
            total += loss * self._judge.weight(lesson)
            weights += self._judge.weight(lesson)
        return total / weights

    def _values(self) -> dict[str, torch.Tensor]:
        """The student's tensors."""
        with self._student.healed():
            return {name: each.detach() for name, each in self._tensors.items()}

    def _take_best(self) -> None:
        with self._student.healed(), torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self._state.best[name])

    def _told(self, stopped: StoppedBy) -> Training:
        state, options = self._state, self._options
        tokens = state.steps * self._step_tokens
        return Training(
            train=options.train,
            loss=_LOSSES[self._teacher.judged],
            trained_parameters=sum(each.numel() for each in self._tensors.values()),
            steps=state.steps,
            tokens=tokens,
            seconds=state.seconds,
            stopped_by=stopped,
            stopped_on=self._stopped_on,
            checks=state.checks,
            learning_rate=self._rate,
        )

    def _save_sometimes(self) -> None:
        """Keeps the state, not more often than costs a small share of the time."""
        if self._store is None or time.monotonic() - self._saved_at < _SAVE_EVERY_S:
            return
        began = time.monotonic()
        self._save()
        taken = time.monotonic() - began
        self._saved_at = time.monotonic() + max(0.0, taken / _SHARE_FOR_SAVING - _SAVE_EVERY_S)

    def _save(self) -> None:
        assert self._store is not None
        state = self._state
        told: dict[str, Any] = {
            "steps": state.steps,
            "seconds": state.seconds,
            "best_loss": state.best_loss,
            "checks": [check.model_dump(mode="json") for check in state.checks],
            "check_s": self._check_s,
            "updates": {},
        }
        arrays = named("now", self._values()) | named("best", state.best)
        for name, tensor in self._tensors.items():
            moments = dict(self._optimizer.state.get(tensor, {}))
            if moments:  # a weight without a gradient in a step has fewer updates than steps
                told["updates"][name] = float(moments.pop("step"))
            arrays |= named(f"moments:{name}", moments)
        # Two names in turn: a kill while one is written leaves the other.
        self._store.keep_arrays(f"state-{self._saves % 2}", told, arrays)
        self._saves += 1

    def _resume(self) -> None:
        store = self._store
        kept = {} if store is None else {
            number: store.find_arrays(f"state-{number}") for number in range(2)
        }  # fmt: skip
        found = self._workers.from_first({name: each for name, each in kept.items() if each})
        if not found:
            if store is not None and any(store.is_stale(f"state-{n}") for n in range(2)):
                self._progress.say("heal: an interrupted run had other settings: begun again")
            return
        with contextlib.suppress(KeyError, TypeError, ValueError):  # anybody may have written it
            newest = max(found, key=lambda number: found[number][0]["steps"])
            self._take(*found[newest])
            self._saves = newest + 1  # the next one is written over the older one
            self._progress.say(
                f"heal: resuming from step {self._state.steps} of an interrupted run"
            )

    def _take(self, told: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        state = _State(
            int(told["steps"]),
            float(told["seconds"]),
            float(told["best_loss"]),
            {
                name: tensor_like(arrays[f"best:{name}"], each)
                for name, each in self._tensors.items()
            },
            [TrainingCheck.model_validate(each) for each in told["checks"]],
        )
        self._check_s = float(told["check_s"])
        now = {
            name: tensor_like(arrays[f"now:{name}"], each) for name, each in self._tensors.items()
        }
        moments = {
            name: moments_of(arrays, name, each, told["updates"].get(name, state.steps))
            for name, each in self._tensors.items()
        }
        with self._student.healed(), torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(now[name])
                if moments[name]:
                    self._optimizer.state[tensor] = moments[name]
        self._state = state
        self._done = self._fraction()


_LOSSES: dict[Judged, Literal["answers", "classes", "embeddings"]] = {
    "tokens": "answers", "classes": "classes", "embeddings": "embeddings",
}  # fmt: skip


def _states_weight(student: Student, options: HealOptions) -> float:
    """Of the hidden states' error; an embedding alone is too little to learn from."""
    usual = 0.0 if predicts_tokens(student.model) else 1.0
    return options.states_weight or usual
