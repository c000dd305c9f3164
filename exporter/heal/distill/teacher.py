"""What the whole model answers to some samples, and how far the student's answers are from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.heal.memory import KEPT_BYTES
from exporter.models.ablation.embeddings import (
    by_position,
    classifies_tokens,
    cosines,
    has_separate_labels,
)
from exporter.models.ablation.meter import judged_by
from exporter.models.changed_weights import bfloat16_where_fast
from exporter.models.sentence_folder import MEAN, Pooling, pooling_of_model
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import Batch, Sources

if TYPE_CHECKING:
    from exporter.heal.distill.student import Answer, Student

_CHUNK_BYTES = 4 << 20
"""Of float32 logits that are worked on at once: what stays in a processor's cache."""


class _Divergence(torch.autograd.Function):
    """Mean KL divergence from one distribution to another, over the positions of a mask.

    The gradient, ``(q - p) / positions``, is made in the same pass, a few positions at a time and
    in the logits' own dtype: nothing of the vocabulary's size is kept in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        vocabulary = student.shape[-1]
        rows = student.reshape(-1, vocabulary), teacher.reshape(-1, vocabulary)
        weights = mask.reshape(-1).float() / mask.sum()
        gradient = torch.empty_like(rows[0]) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK_BYTES // (4 * vocabulary))
        total = weights.new_zeros(())
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            log_q = rows[0][part].float().log_softmax(-1)
            log_p = rows[1][part].float().log_softmax(-1)
            p = log_p.exp()
            differences = torch.where(p > 0, log_p - log_q, 0.0)
            total += torch.linalg.vecdot(p, differences) @ weights[part]
            if gradient is not None:
                gradient[part] = log_q.exp_().sub_(p).mul_(weights[part, None])
        if gradient is not None:
            ctx.save_for_backward(gradient.reshape(student.shape))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None


def answer_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean KL divergence of the student's next-token distributions from the teacher's, in nats.

    student: logits `[batch, tokens, vocabulary]`.
    mask: `[batch, tokens]`, boolean; False marks padding.
    """
    loss: torch.Tensor = _Divergence.apply(student, teacher, mask)  # type: ignore[no-untyped-call]
    return loss


def embedding_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, pooling: Pooling = MEAN
) -> torch.Tensor:
    """1 minus the mean cosine of the student's embeddings with the teacher's.

    student: the last hidden states, `[batch, tokens, hidden]`.
    mask: `[batch, tokens]`, boolean; False marks padding.
    """
    own, other = pooling(student.float(), mask), pooling(teacher.float(), mask)
    loss: torch.Tensor = 1 - cosines(other, own).mean()
    return loss


def class_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, *, separate: bool = False
) -> torch.Tensor:
    """Mean KL divergence of the student's classes from the teacher's, in nats.

    Of a single logit, by which rerankers order, half the mean squared difference: of large logits a
    divergence would tell little.

    student: logits `[batch, classes]` or `[batch, tokens, classes]`.
    mask: `[batch, tokens]`, boolean; False marks padding.
    """
    if teacher.shape[-1] == 1:
        differences = (student.float() - teacher.float())[..., 0]
        counted = differences[mask] if differences.shape == mask.shape else differences
        return counted.square().mean() / 2
    given, _ = by_position(student, mask, separate=separate)
    return answer_loss(given, *by_position(teacher, mask, separate=separate))


def state_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Relative squared error of the student's hidden states, mean over the layers.

    student: of each layer, `[batch, tokens, hidden]`.
    mask: `[batch, tokens]`, boolean; False marks padding.
    """
    errors = [
        (own.float() - other.float())[mask].square().mean() / other.float()[mask].square().mean()
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


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
        tensors = [given.given, *given.states]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._keeps and size <= self._free_bytes:
            self._kept[lesson.rows] = tensors
            self._free_bytes -= size
        return tensors

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
        """How near a student is to the whole model, as a divergence; None for embeddings."""
        if self.judged == "embeddings":
            return None
        if self.judged == "tokens" or self.answers(lessons[0])[0].shape[-1] > 1:
            return loss
        logits = [self.answers(lesson)[0] for lesson in lessons]
        variance = float(torch.cat([logit.flatten() for logit in logits]).float().var(correction=0))
        return loss / variance if variance else loss

    def weight(self, lesson: Lesson) -> float:
        """How much a lesson's loss counts among others: by its tokens, or its texts."""
        return float(lesson.mask.sum()) if self._by_tokens else float(len(lesson.rows))
