"""Whether memory suffices for a training, and what needs less where it ran out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from exporter.errors import HealingError, is_out_of_memory
from exporter.models.changed_weights import has_fast_bfloat16
from exporter.models.tasks import task_of
from exporter.processes import available_bytes

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


def needed_bytes(model: Any, options: HealOptions, trained: int) -> int:
    """About how much memory a training of so many numbers takes beside the weights."""
    config = model.config.get_text_config()
    layers, width, own = config.num_hidden_layers, config.hidden_size, model.dtype.itemsize
    size = 2 if has_fast_bfloat16(training_device(model)) else own
    answer = size * task_of(model).numbers_a_token
    step = max(options.step_tokens, options.sequence_length)
    of_step = step * (layers * width * _ACTIVATIONS * size + _STEP_ANSWERS * answer)
    merged = model.num_parameters(exclude_embeddings=True) * own  # it is judged with these
    return int(max(trained * _STATE_BYTES + of_step + KEPT_BYTES, merged))


def free_bytes(model: Any) -> int | None:
    """What is free beside the weights where a model is healed; None where that isn't known."""
    import torch

    device = training_device(model)
    if device.type != "cuda":
        return available_bytes()
    free = int(torch.cuda.mem_get_info(device)[0])
    return free if device == model.device else free - model.num_parameters() * model.dtype.itemsize


@contextlib.contextmanager
def telling_memory(options: HealOptions) -> Iterator[None]:
    """Says what needs less where memory is short."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = "a smaller --sequence-length or batch_size"
        raise HealingError(
            f"Memory ran out while the cut was healed ({options.decided}).",
            f"Try {smaller}, step_tokens or rank." if options.trains else f"Try {smaller}.",
            code="out-of-memory",
        ) from error


def training_device(model: Any) -> torch.device:
    """Where a model is trained: on this process's GPU where there is one, else where it is."""
    import torch

    if model.device.type != "cpu" or not torch.cuda.is_available():
        result: torch.device = model.device
        return result
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
