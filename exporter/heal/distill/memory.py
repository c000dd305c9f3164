"""How much memory a training needs, told before it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from exporter.errors import HealingError, is_out_of_memory
from exporter.heal.texts import MOST_HELD_OUT

if TYPE_CHECKING:
    from exporter.heal.distill.student import Student
    from exporter.heal.options import HealOptions

_STATE_BYTES = 16
"""For each trained number: its gradient, two moments and the best value so far, in float32."""
_ACTIVATIONS = 40
"""Numbers of two bytes that a layer keeps for each token, in widths of the residual stream."""
_PRODUCTS = 12
"""Of a layer, in widths that adapters read and write: attention's four and the MLP's three."""
KEPT_BYTES = 2 << 30
"""At most so much of the whole model's answers is kept for a text that is read again."""
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


def needed_by(model: Any, options: HealOptions, trained: int | None = None) -> int:
    """About how much memory the training of a model takes beside its weights, in bytes.

    The whole model's answers to the held-out samples of one text count with the most that these
    may be.

    Args:
        model: A transformers model.
        options: How it is trained.
        trained: How many numbers are trained; None: about that many.
    """
    config = model.config.get_text_config()
    vocabulary = config.vocab_size if model.can_generate() else 0
    held_out = options.sequence_length * MOST_HELD_OUT // 2
    layers, width, weights = config.num_hidden_layers, config.hidden_size, model.num_parameters()
    everything = options.train == "all"
    if trained is None:
        trained = (
            weights if everything else _PRODUCTS * 2 * layers * width * (options.used_rank or 0)
        )
    return needed_bytes(
        trained * model.dtype.itemsize if everything else 0,
        trained,
        max(options.step_tokens, options.sequence_length),
        layers=layers,
        width=width,
        vocabulary=vocabulary,
    ) + min(KEPT_BYTES, held_out * vocabulary * 2)


def told_memory(student: Student, options: HealOptions) -> str:
    """What is trained, and about how much memory that takes, in a line."""
    model: Any = student.model
    trained = sum(each.numel() for each in student.trained.values())
    held = model.num_parameters() * model.dtype.itemsize
    needed = held + needed_by(model, options, trained)
    return (
        f"heal: {trained / 1e6:.1f} million numbers are trained ({options.train}), which takes "
        f"about {needed / 1e9:.1f} GB of memory"
    )


@contextlib.contextmanager
def telling_memory(options: HealOptions) -> Iterator[None]:
    """Says what needs less where memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = (
            f"step_tokens {max(1, options.step_tokens // 2)}, "
            f"--sequence-length {max(2, options.sequence_length // 2)}, "
            f"batch_size {max(1, options.batch_size // 2)} (of checks)"
        )
        raise HealingError(
            f"Memory ran out while the cut was trained ({options.train}, "
            f"{options.step_tokens} tokens a step in samples of {options.sequence_length}).",
            f"Try {smaller}, or a smaller --rank"
            + (", or train: adapters." if options.train == "all" else "."),
            code="out-of-memory",
        ) from error
