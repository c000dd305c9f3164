"""What the whole model answers to some samples, and how far the student's answers are from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.heal.memory import KEPT_BYTES
from exporter.models.ablation.losses import state_loss
from exporter.models.changed_weights import bfloat16_where_fast
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import Batch, Sources

if TYPE_CHECKING:
    from exporter.heal.distill.student import Answer, Student


@dataclass(frozen=True, eq=False)
class Lesson:
    """Some samples of a text."""

    rows: tuple[int, ...]
    ids: NDArray[np.int64]  # `[batch, tokens]`
    mask: NDArray[np.bool_]  # `[batch, tokens]`; False marks padding
    # `[batch, tokens]`, of which text of a pair each token is, where the model is told
    types: NDArray[np.int64] | None = None
    sources: Sources | None = None

    @classmethod
    def of(cls, text: CalibrationText, size: int) -> list[Lesson]:
        """A whole text, ``size`` samples at a time."""
        samples = len(text.input_ids)
        starts = range(0, samples, size)
        return [cls.of_rows(text, range(s, min(s + size, samples))) for s in starts]

    @classmethod
    def of_rows(cls, text: CalibrationText, rows: Sequence[int]) -> Lesson:
        """Some samples of a text, without what is padding in all of them."""
        chosen = list(rows)
        types = None if text.types is None else text.types[chosen]
        sources = None if text.sources is None else text.sources.rows(np.array(chosen))
        batch = Batch(0, chosen[0], text.input_ids[chosen], text.mask[chosen], sources, types)
        short = batch.trimmed()
        return cls(tuple(chosen), short.ids, short.mask, short.types, sources)

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What the model is called with."""
        return Batch(0, 0, self.ids, self.mask, self.sources, self.types).inputs(device)


class Teacher:
    """The whole model."""

    def __init__(self, student: Student, *, keeps: bool, states: float = 0.0) -> None:
        self._student, self._keeps = student, keeps
        self._kept: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._free_bytes = KEPT_BYTES
        self._states = states
        self.wants_states, self._task = states > 0, student.task

    def answers(self, lesson: Lesson) -> list[torch.Tensor]:
        """Logits, or last hidden states to embed; then those of each layer if they are wanted."""
        if lesson.rows in self._kept:
            return self._kept[lesson.rows]
        with bfloat16_where_fast(self._student.model.device):
            given = self._student.teach(
                lesson.inputs(self._student.model.device), states=self.wants_states
            )
        tensors = [given.given, *given.states]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._keeps and size <= self._free_bytes:
            self._kept[lesson.rows] = tensors
            self._free_bytes -= size
        return tensors

    def loss(self, given: Answer, answers: list[torch.Tensor], lesson: Lesson) -> torch.Tensor:
        """How far what the student gave is from what :meth:`answers` gave, over real tokens."""
        mask = torch.from_numpy(lesson.mask).to(answers[0].device)
        loss = self._task.loss(given.given, answers[0], mask)
        if self._states:
            loss = loss + self._states * state_loss(given.states, answers[1:], mask)
        return loss

    def nearness(self, loss: float, lessons: Sequence[Lesson]) -> float | None:
        """See :meth:`exporter.models.tasks.Task.nearness`."""
        return self._task.nearness(loss, lambda: [self.answers(lesson)[0] for lesson in lessons])

    def weight(self, lesson: Lesson) -> float:
        """How much a lesson's loss counts among others: by its tokens, or its texts."""
        return self._task.weight(lesson.mask)
