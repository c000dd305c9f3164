"""Trains a student until its tokens or its time are used up, or held-out text gains no more."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.artifacts import StoppedBy, Train, Training, TrainingCheck
from exporter.artifacts.store import Store
from exporter.errors import HealingError
from exporter.heal.automatic import telling_memory
from exporter.heal.distill.student import Student
from exporter.heal.options import HealOptions
from exporter.models.ablation.losses import state_loss
from exporter.models.changed_weights import bfloat16_where_fast
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import Batch
from exporter.progress import QUIET, Progress

_HIGHEST = {"adapters": 1e-3, "all": 2e-4}
_LOSS_OF_FULL_RATE = 0.2
"""A cut that begins nearer to the whole model's answers, in nats, is trained at a lower rate.

Their divergence grows with the square of the weights' distance, and the rate is how far a step of
Adam goes. SmolLM2-135M without one attention of 30 began at 0.025: 1e-3 led away from there. So did
2e-3 from the 0.04 of a reranker, all-MiniLM-L6-v2 with a random head and without one attention of
6, where 5e-4 and 1e-4 took back 50 and 44 % of the loss.
"""
_LEAST_LOSS = 1e-6
"""What was measured may be nothing, or a little less by rounding, where a cut changes nothing."""
_SHARE_OF_REPLACEMENTS = 0.05
"""Of the rate of adapters: fitted maps are full matrices, and adapters begin at nothing.

all-MiniLM-L6-v2 without attentions 2 and 3 begins at a mean cosine of 0.956 with maps in their
places; with one rate for all the first 9,000 tokens led it down to 0.913, with 0.03 to 0.1 of the
rate for the maps 60,000 tokens led to 0.964.
"""
_WARM_UP = 0.05
"""Share of the training in which the learning rate rises."""


def usual_rate(train: Train, begins: float | None, most: float = 1.0) -> float:
    """The highest learning rate; ``most``: that of a kind of answers, :attr:`Task.fastest`."""
    if begins is None:
        return _HIGHEST[train] * most
    share = math.sqrt(max(begins, _LEAST_LOSS) / _LOSS_OF_FULL_RATE)
    return _HIGHEST[train] * min(most, share)


def rate_share(done: float) -> float:
    """The learning rate's share: a short rise, then half a cosine down to nothing."""
    if done < _WARM_UP:
        return (done + 0.005) / (_WARM_UP + 0.005)
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def rate_groups(
    trained: Mapping[str, torch.Tensor], replacing: Collection[str], train: Train
) -> list[dict[str, Any]]:
    """The groups of an optimizer, each with its ``share`` of the learning rate."""
    shares = dict.fromkeys(trained, 1.0)
    if train == "adapters":
        shares |= dict.fromkeys(replacing, _SHARE_OF_REPLACEMENTS)
    return [
        {"params": [trained[name] for name, own in shares.items() if own == share], "share": share}
        for share in sorted(set(shares.values()))
    ]


class Schedule:
    """The samples of a text, step by step, in another order whenever it is read again.

    Paragraphs, which are padded, are read beside others of about the same length, always the same
    ones: so there is little padding, and the whole model's answers to them can be kept.
    """

    def __init__(self, text: CalibrationText, options: HealOptions) -> None:
        lengths = text.mask.sum(axis=1)
        mean, self._count, self._seed = float(lengths.mean()), len(lengths), options.seed
        self._per_step = min(max(1, int(options.step_tokens // mean)), self._count)
        self.step_tokens = round(self._per_step * mean)
        self.total_steps = max(1, round(options.trained_tokens / self.step_tokens))
        order: list[int] = np.argsort(lengths, kind="stable").tolist()
        size = self._per_step
        alike_long = [order[start : start + size] for start in range(0, len(order), size)]
        self._groups = [] if text.mask.all() else alike_long
        epochs = self.total_steps * self._per_step / self._count
        fixed = self._per_step == 1 or bool(self._groups)
        self.reads_steps_again = epochs > 1 and fixed

    def rows(self, step: int) -> list[int]:
        """The numbers of the samples of a step."""
        if self._groups:
            epoch, place = divmod(step, len(self._groups))
            return self._groups[_shuffled(self._seed, epoch, len(self._groups))[place]]
        places = range(step * self._per_step, (step + 1) * self._per_step)
        return [int(self._order(place // self._count)[place % self._count]) for place in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The first is the text's own, a mixture of its sources throughout."""
        if epoch == 0:
            return np.arange(self._count)
        return _shuffled(self._seed, epoch, self._count)


@cache
def _shuffled(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


_KEPT_BYTES = 2 << 30
"""At most so much of the whole model's answers is kept for a text that is read again."""


class Teacher:
    """The whole model."""

    def __init__(self, student: Student, *, keeps: bool, states: float = 0.0) -> None:
        self._student, self._keeps = student, keeps
        self._kept: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._free_bytes = _KEPT_BYTES
        self._states = states
        self._task = student.task

    def answers(self, lesson: Batch) -> list[torch.Tensor]:
        """Logits, or last hidden states to embed; then those of each layer if they are wanted."""
        samples = tuple(lesson.samples)
        if samples in self._kept:
            return self._kept[samples]
        model = self._student.model
        with bfloat16_where_fast(model):
            given = self._student.teach(lesson.inputs(model.device), states=self._states > 0)
        tensors = [given.given, *given.states]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._keeps and size <= self._free_bytes:
            self._kept[samples] = tensors
            self._free_bytes -= size
        return tensors

    def loss(self, lesson: Batch, answers: list[torch.Tensor]) -> torch.Tensor:
        """How far what the student gives is from what :meth:`answers` gave, over real tokens."""
        model = self._student.model
        with bfloat16_where_fast(model):
            given = self._student.answer(lesson.inputs(model.device), states=self._states > 0)
            mask = lesson.mask_on(answers[0].device)
            loss = self._task.loss(given.given, answers[0], mask)
            if self._states:
                loss = loss + self._states * state_loss(given.states, answers[1:], mask)
        return loss

    def nearness(self, loss: float, lessons: Sequence[Batch]) -> float | None:
        """See :meth:`exporter.models.tasks.Task.nearness`."""
        return self._task.nearness(loss, lambda: [self.answers(lesson)[0] for lesson in lessons])

    def weight(self, lesson: Batch) -> float:
        """How much a lesson's loss counts among others: by its tokens, or its texts."""
        return self._task.weight(lesson.mask)


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
    """Where a training stands; what an interrupted one goes on from."""

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
    """One training of one student."""

    def __init__(
        self,
        student: Student,
        text: CalibrationText,
        held_out: CalibrationText,
        options: HealOptions,
        store: Store | None = None,  # None keeps nothing
        progress: Progress = QUIET,
    ) -> None:
        self._student, self._options, self._progress = student, options, progress
        self._text, self._store = text, store
        self._stopped_on = held_out.ref
        self._schedule = schedule = Schedule(text, options)
        self._step_tokens, self._total_steps = schedule.step_tokens, schedule.total_steps
        states = student.task.states_weight
        self._teacher = Teacher(student, keeps=schedule.reads_steps_again, states=states)
        self._judges = [batch.trimmed() for batch in held_out.batches(options.batch_size)]
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
        """Trains, and leaves the best state in the student."""
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
                code="healing-gained-nothing",
            )
        with self._student.healed(), torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self._state.best[name])
        return self._told(stopped)

    def _begin(self) -> None:
        """Checks the bare cut and what was fitted, and drops that if it gains nothing."""
        checks = self._state.checks
        resumed = bool(checks)
        if not resumed:
            with self._student.bare():
                self._check()
            if self._student.is_fitted:
                self._check()
        if len(checks) > 1 and checks[1].held_out_loss >= checks[0].held_out_loss:
            self._student.begin_bare(empties=not resumed)
        begins = min(check.held_out_loss for check in checks if not check.tokens)
        near = self._judge.nearness(begins, self._judges)
        self._rate = self._options.learning_rate or usual_rate(
            self._options.train, near, self._student.task.fastest
        )

    def _go_on(self) -> StoppedBy | None:
        """One step, with a check where one is due; why the training ends, if it does."""
        began = time.monotonic()
        try:
            loss = self._step()
            self._done = done = self._fraction(began)
            if not math.isfinite(loss):
                self._progress.say("heal: the loss is no longer finite; the best state is kept")
                return "diverged"
            made = sum(check.tokens > 0 for check in self._state.checks)
            if done >= 1 or done * self._checks >= made + 1:
                self._check(began)
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
        value: float = self._state.steps / self._total_steps
        if self._options.time_s is not None:
            more = 0.0 if began is None else time.monotonic() - began
            # The last check is within the time, too.
            steps_s = max(self._options.time_s - self._check_s, self._options.time_s / 2)
            value = max(value, (self._state.seconds + more) / steps_s)
        return min(1.0, value)

    def _step(self) -> float:
        """One step of the optimizer; the loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * group["share"] * rate_share(self._done)
        lesson = self._text.batch(self._schedule.rows(self._state.steps))
        answers = self._teacher.answers(lesson)
        with self._student.healed():
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._teacher.loss(lesson, answers)
            loss.backward()  # type: ignore[no-untyped-call]
            tensors = [tensor for tensor in self._tensors.values() if tensor.grad is not None]
            length = torch.nn.utils.clip_grad_norm_(tensors, _LONGEST_GRADIENT)
            usable = bool(length.isfinite())
            if usable:
                self._optimizer.step()
        self._state.steps += 1
        return float(loss.detach()) if usable else math.nan

    def _check(self, began: float | None = None) -> None:
        """Looks at held-out text, and keeps the state if it is the best so far."""
        started = time.monotonic()
        held_out = self._held_out_loss()
        self._check_s = time.monotonic() - started
        state = self._state
        seconds = state.seconds + (0.0 if began is None else time.monotonic() - began)
        tokens = state.steps * self._step_tokens
        state.checks.append(TrainingCheck(tokens=tokens, held_out_loss=held_out))
        if held_out < state.best_loss:
            state.best_loss = held_out
            state.best = {name: value.clone() for name, value in self._values().items()}
        self._progress.say(self._words(tokens, seconds, held_out))

    def _words(self, tokens: int, seconds: float, held_out: float) -> str:
        first = self._state.checks[0].held_out_loss
        if not tokens:
            state = "of what was fitted" if len(self._state.checks) > 1 else "of the bare cut"
            return f"heal: {self._student.task.loss_words(held_out)} {state}, before the training"
        left = seconds * (1 / max(1e-9, self._done) - 1)
        words = self._student.task.loss_words(held_out)
        return (
            f"heal: {tokens:,} of {self._total_steps * self._step_tokens:,} tokens, "
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s, about {left / 60:.1f} min left; "
            f"{words} ({100 * (1 - held_out / first):.0f} % recovered)"
        )

    def _held_out_loss(self) -> float:
        total = weights = 0.0
        for lesson in self._judges:
            answers = self._judge.answers(lesson)
            with self._student.healed(), torch.no_grad():
                loss = float(self._judge.loss(lesson, answers))
            total += loss * self._judge.weight(lesson)
            weights += self._judge.weight(lesson)
        return total / weights

    def _values(self) -> dict[str, torch.Tensor]:
        """The student's tensors."""
        with self._student.healed():
            return {name: tensor.detach() for name, tensor in self._tensors.items()}

    def _told(self, stopped: StoppedBy) -> Training:
        state, options = self._state, self._options
        tokens = state.steps * self._step_tokens
        return Training(
            train=options.train,
            loss=self._student.task.learns,
            trained_parameters=sum(tensor.numel() for tensor in self._tensors.values()),
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
        results = {
            "steps": state.steps,
            "seconds": state.seconds,
            "best_loss": state.best_loss,
            "checks": [check.model_dump(mode="json") for check in state.checks],
            "check_s": self._check_s,
        }
        parts = {"now": self._values(), "best": state.best}
        for name, tensor in self._tensors.items():
            for part, held in self._optimizer.state.get(tensor, {}).items():
                parts.setdefault(part, {})[name] = held
        arrays = {
            f"{part}:{name}": tensor.detach().float().cpu().numpy()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        # Two names in turn: a kill while one is written leaves the other.
        self._store.keep_arrays(f"state-{self._saves % 2}", results, arrays)
        self._saves += 1

    def _resume(self) -> None:
        store = self._store
        if store is None:
            return
        kept = {number: store.find_arrays(f"state-{number}") for number in range(2)}
        result = {number: value for number, value in kept.items() if value}
        if not result:
            if any(store.is_stale(f"state-{n}") for n in range(2)):
                self._progress.say("heal: an interrupted run had other settings: begun again")
            return
        with contextlib.suppress(
            KeyError, TypeError, ValueError, RuntimeError
        ):  # anybody may have written it
            newest = max(result, key=lambda number: result[number][0]["steps"])
            self._take(*result[newest])
            self._saves = newest + 1  # the next one is written over the older one
            self._progress.say(
                f"heal: resuming from step {self._state.steps} of an interrupted run"
            )

    def _take(self, items: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        def held(part: str, name: str) -> torch.Tensor:
            like, array = self._tensors[name], torch.from_numpy(np.array(arrays[f"{part}:{name}"]))
            return array.reshape(()) if part == "step" else array.reshape(like.shape).to(like)

        now, best = ({name: held(part, name) for name in self._tensors} for part in ("now", "best"))
        # A weight without a gradient has no moments.
        moments = {
            tensor: {part: held(part, name) for part in ("step", "exp_avg", "exp_avg_sq")}
            for name, tensor in self._tensors.items()
            if f"step:{name}" in arrays
        }
        checks = [TrainingCheck.model_validate(check) for check in items["checks"]]
        loss, seconds = float(items["best_loss"]), float(items["seconds"])
        state = _State(int(items["steps"]), seconds, loss, best, checks)
        self._check_s = float(items["check_s"])
        with self._student.healed(), torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(now[name])
        self._optimizer.state.update(moments)
        self._state = state
        self._done = self._fraction()
