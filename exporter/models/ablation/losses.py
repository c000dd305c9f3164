"""How far what a student gives is from what its teacher gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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
