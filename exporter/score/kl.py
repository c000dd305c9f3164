"""How far the model's next-token distributions move when a sublayer is skipped.

Formula: ``S = mean over positions of KL(p_t || q_t)``, with ``p`` of the whole model and ``q`` of
the model without the sublayer, each ``[batch, positions, vocabulary]``, in float32.
Range 0 to infinity, nats; 0: no answer changes, so the sublayer is redundant.
Source: the metric of logits of arXiv 2407.16286; as a search's fitness, arXiv 2410.14649.
Where this differs: no text is judged by its labels, so any text will do; every second position is
looked at (neighbours tell nearly the same, and the head costs a fifth of a small model's run); the
layers below the skipped one are not run again.
Cost: half a forward pass for each sublayer, so about as many passes as the model has layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.score.metric import AnswerMetric

if TYPE_CHECKING:
    from exporter.models.ablation import Damage


def mean_kl(damage: Damage) -> float:
    """Mean KL divergence at a position, in nats."""
    return damage.kl


def std_error(damage: Damage) -> float | None:
    """Its standard error over samples."""
    return damage.kl_std_error


KL = AnswerMetric("kl", mean_kl, std_error)
