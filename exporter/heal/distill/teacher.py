"""What the whole model answers to some samples, and how far the student's answers are from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.heal.distill.loss import answer_loss, class_loss, embedding_loss, state_loss
from exporter.heal.memory import KEPT_BYTES
from exporter.models.ablation.embeddings import classifies_tokens, has_separate_labels
from exporter.models.ablation.meter import judged_by
from exporter.models.bfloat16 import bfloat16_where_fast
from exporter.models.sentence_folder import pooling_of_model
from exporter.models.texts.batches import Batch, Sources
from exporter.models.texts.calibration import CalibrationText

if TYPE_CHECKING:
    from exporter.heal.distill.student import Answer, Student


@dataclass(frozen=True, eq=False)
class Lesson:
    """Some samples of a text.

    Attributes:
        rows: Their numbers in the text.
        ids: ``[batch, tokens]``.
        mask: ``[batch, tokens]``; False marks padding.
        types: ``[batch, tokens]``, of which text of a pair each token is, where the model is told.
        sources: Of a model of images these.
    """

    rows: tuple[int, ...]
    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
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
    """The whole model.

    Args:
        student: The model that is both.
        keeps: Whether its answers are kept for a text that is read again, as far as there is room.
        states: The weight of the hidden states' error beside that of the answers.
    """

    def __init__(self, student: Student, *, keeps: bool, states: float = 0.0) -> None:
        self._student, self._keeps = student, keeps
        self._kept: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._free_bytes = KEPT_BYTES
        self._states = states
        self.judged = judged_by(student.model)
        self._by_tokens = self.judged == "tokens" or classifies_tokens(student.model)
        self._separate = has_separate_labels(student.model)
        self.wants_states = states > 0
        self._pooling = pooling_of_model(student.model)

    def answers(self, lesson: Lesson) -> list[torch.Tensor]:
        """Logits, or last hidden states to embed; then those of each layer if they are wanted."""
        if lesson.rows in self._kept:
            return self._kept[lesson.rows]
        with bfloat16_where_fast(self._student.model.device):
            given = self._student.teach(
                lesson.inputs(self._student.model.device), states=self.wants_states
            )
        found = [given.given, *given.states]
        size = sum(each.numel() * each.element_size() for each in found)
        if self._keeps and size <= self._free_bytes:
            self._kept[lesson.rows] = found
            self._free_bytes -= size
        return found

    def loss(self, given: Answer, answers: list[torch.Tensor], lesson: Lesson) -> torch.Tensor:
        """How far what the student gave is from what :meth:`answers` gave, over real tokens."""
        mask = torch.from_numpy(lesson.mask).to(answers[0].device)
        if self.judged == "tokens":
            loss = answer_loss(given.given, answers[0], mask)
        elif self.judged == "classes":
            loss = class_loss(given.given, answers[0], mask, separate=self._separate)
        else:
            loss = embedding_loss(given.given, answers[0], mask, self._pooling)
        if self._states:
            loss = loss + self._states * state_loss(given.states, answers[1:], mask)
        return loss

    def nearness(self, loss: float, lessons: Sequence[Lesson]) -> float | None:
        """How near a student is to the whole model, as a divergence; None for embeddings.

        Args:
            loss: What :meth:`loss` gave on the lessons, on average. The squared error of single
                logits, which may be of any size, is taken relative to their variance.
            lessons: Samples.
        """
        if self.judged == "embeddings":
            return None
        if self.judged == "tokens" or self.answers(lessons[0])[0].shape[-1] > 1:
            return loss
        logits = [self.answers(each)[0] for each in lessons]
        variance = float(torch.cat([each.flatten() for each in logits]).float().var(correction=0))
        return loss / variance if variance else loss

    def weight(self, lesson: Lesson) -> float:
        """How much a lesson's loss counts among others: by its tokens, or its texts."""
        return float(lesson.mask.sum()) if self._by_tokens else float(len(lesson.rows))
