"""How much memory a training needs, told before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.heal.distill.student import Student
    from exporter.heal.options import HealOptions

_STATE_BYTES = 16
"""For each trained number: its gradient, two moments and the best value so far, in float32."""
_ACTIVATIONS = 40
"""Numbers of two bytes that a layer keeps for each token, in widths of the residual stream."""
_LOGITS_BYTES = 8
"""For each token and word of the vocabulary: both models' logits and gradients, in bfloat16."""


def needed_bytes(
    weights: int, trained: int, step_tokens: int, *, layers: int, width: int, vocabulary: int
) -> int:
    """About how much a training takes.

    Args:
        weights: Bytes of the model's weights, with the student's own.
        trained: How many numbers are trained.
        step_tokens: Tokens of a step.
        layers: Of the model.
        width: Of the residual stream.
        vocabulary: Words; 0 for a model without a language head.
    """
    activations = step_tokens * layers * width * _ACTIVATIONS * 2
    return weights + trained * _STATE_BYTES + activations + step_tokens * vocabulary * _LOGITS_BYTES


def told_memory(student: Student, options: HealOptions) -> str:
    """What is trained, and about how much memory that takes, in a line."""
    model: Any = student.model
    config = model.config.get_text_config()
    own = sum(each.numel() * each.element_size() for each in student.trained.values())
    held = sum(each.numel() * each.element_size() for each in model.parameters())
    trained = sum(each.numel() for each in student.trained.values())
    needed = needed_bytes(
        held + (own if options.train == "all" else 0),
        trained,
        max(options.step_tokens, options.sequence_length),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size if model.can_generate() else 0,
    )
    return (
        f"heal: {trained / 1e6:.1f} million numbers are trained ({options.train}), which takes "
        f"about {needed / 1e9:.1f} GB of memory"
    )
