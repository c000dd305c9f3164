"""How far the student's answers are from the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from exporter.models.ablation.embeddings import by_position, cosines
from exporter.models.sentence_folder import MEAN, Pooling

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    Args:
        student: Logits ``[batch, tokens, vocabulary]``.
        teacher: The same.
        mask: ``[batch, tokens]``, boolean; False marks padding.
    """
    loss: torch.Tensor = _Divergence.apply(student, teacher, mask)  # type: ignore[no-untyped-call]
    return loss


def embedding_loss(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, pooling: Pooling = MEAN
) -> torch.Tensor:
    """1 minus the mean cosine of the student's embeddings with the teacher's.

    Args:
        student: The last hidden states, ``[batch, tokens, hidden]``.
        teacher: The same.
        mask: ``[batch, tokens]``, boolean; False marks padding.
        pooling: How an embedding is made of them.
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

    Args:
        student: Logits ``[batch, classes]`` or ``[batch, tokens, classes]``.
        teacher: The same.
        mask: ``[batch, tokens]``, boolean; False marks padding.
        separate: Whether each class is a yes or no of its own.
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

    Args:
        student: Of each layer, ``[batch, tokens, hidden]``.
        teacher: The same.
        mask: ``[batch, tokens]``, boolean; False marks padding.
    """
    errors = [
        (own.float() - other.float())[mask].square().mean() / other.float()[mask].square().mean()
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()
