"""Whether memory may not suffice for healing, and what needs less where it ran out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from exporter.errors import HealingError, is_out_of_memory
from exporter.models.ablation.meter import predicts_tokens
from exporter.models.changed_weights import has_fast_bfloat16
from exporter.processes import available_bytes
from exporter.progress import Progress

if TYPE_CHECKING:
    import torch

    from exporter.heal.options import HealOptions

KEPT_BYTES = 2 << 30
"""At most so much of the whole model's answers is kept for a text that is read again."""
_STATE_BYTES = 20
"""For each trained number: its value, gradient, two moments and best value so far, in float32."""
_ACTIVATIONS = 40
"""Numbers that a layer keeps for each token of a step, in widths of the residual stream."""
_STEP_ANSWERS = 4
"""Both models' answers to a step, and the gradients of the student's."""
_SQUARES = 6
"""Matrices of a product's inputs by its inputs, in float64, that a fold is solved with."""


def needed_bytes(model: Any, options: HealOptions, trained: int) -> int:
    """About how much memory healing takes beside the weights."""
    config = model.config.get_text_config()
    layers, width, own = config.num_hidden_layers, config.hidden_size, model.dtype.itemsize
    folding = training = 0
    if options.kind == "fold" or options.begins_folded:
        inputs = int(getattr(config, "intermediate_size", None) or 4 * width)
        folding = model.num_parameters() * own // 2 + 8 * _SQUARES * inputs**2
    if trained:
        size = 2 if has_fast_bfloat16(training_device(model)) else own
        answer = size * (config.vocab_size if predicts_tokens(model) else width * (layers + 1))
        step = max(options.step_tokens, options.sequence_length)
        of_step = step * (layers * width * _ACTIVATIONS * size + _STEP_ANSWERS * answer)
        merged = model.num_parameters(exclude_embeddings=True) * own  # it is judged with these
        training = max(trained * _STATE_BYTES + of_step + KEPT_BYTES, merged)
    return int(max(folding, training))


def free_bytes(model: Any) -> int | None:
    """What is free beside the weights where a model is healed; None where that isn't known."""
    import torch

    device = training_device(model)
    if device.type != "cuda":
        return available_bytes()
    free = int(torch.cuda.mem_get_info(device)[0])
    return free if device == model.device else free - model.num_parameters() * model.dtype.itemsize


def warn_of_memory(model: Any, options: HealOptions, trained: int, progress: Progress) -> None:
    """Says where a healing may need more memory than is free."""
    needed, free = needed_bytes(model, options, trained), free_bytes(model)
    if free is not None and needed > free:
        progress.say(
            f"heal: warning: this may take {needed / 1e9:.1f} GB of memory beside the weights, and "
            f"{free / 1e9:.1f} are free; {_smaller(options)} needs less"
        )


@contextlib.contextmanager
def telling_memory(options: HealOptions) -> Iterator[None]:
    """Says what needs less where memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise HealingError(
            f"Memory ran out while the cut was healed ({options.decided}).",
            f"Try {_smaller(options)}"
            + (", or train: adapters." if options.train == "all" else "."),
            code="out-of-memory",
        ) from error


def _smaller(options: HealOptions) -> str:
    """What memory hangs on, as a user gives it, at half its size."""
    sizes = [f"step_tokens {max(1, options.step_tokens // 2)}"] if options.trains else []
    sizes.append(f"--sequence-length {max(2, options.sequence_length // 2)}")
    sizes.append(f"batch_size {max(1, options.batch_size // 2)}")
    if options.used_rank is not None:
        sizes.append(f"--rank {max(1, options.used_rank // 2)}")
    return ", ".join(sizes)


def training_device(model: Any) -> torch.device:
    """Where a model is trained: on this process's GPU where there is one, else where it is."""
    import torch

    if model.device.type != "cpu" or not torch.cuda.is_available():
        found: torch.device = model.device
        return found
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
