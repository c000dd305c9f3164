"""How much memory healing takes, told before it begins."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exporter.errors import HealingError, is_out_of_memory
from exporter.heal.fold.memory import folding_bytes, free_bytes, gigabytes
from exporter.heal.texts import MOST_HELD_OUT
from exporter.models.ablation.meter import KEPT_BYTES as CHECKED_BYTES
from exporter.models.ablation.meter import predicts_tokens
from exporter.models.bfloat16 import has_fast_bfloat16
from graph_passes.types import SublayerRef

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
_CHECKED_ANSWERS = 3
"""Of a batch whose damage is measured: both models' answers, and what is compared of them."""
_SMALLEST_STEP = 64


@dataclass(frozen=True)
class HealingMemory:
    """About how much memory a healing takes, in bytes.

    Attributes:
        weights: The model's.
        folded: The new values of weights that folding changes; they stay.
        folding: What folding takes besides: sums over tokens, and the text's hidden states.
        training: Trained numbers with all that belongs to them, the activations of a step, and
            the whole model's answers.
        measuring: To hold the healed cut against the whole model, with merged weights of its own.
    """

    weights: int
    folded: int
    folding: int
    training: int
    measuring: int

    @property
    def beside_weights(self) -> int:
        """At the most: it folds, trains and measures one after the other."""
        return self.folded + max(self.folding, self.training, self.measuring)

    @property
    def total(self) -> int:
        """With the model's weights."""
        return self.weights + self.beside_weights

    def told(self) -> str:
        """In words."""
        later = {"fold": self.folding, "train": self.training, "measure": self.measuring}
        parts = [f"{gigabytes(size)} to {what}" for what, size in later.items() if size]
        told = (
            f"about {gigabytes(self.total)} GB of memory: {gigabytes(self.weights)} for the "
            f"weights, {gigabytes(self.folded)} for those that folding changes"
        )
        return f"{told}, and at different times {', '.join(parts)}" if parts else told


def healing_memory(
    model: Any,
    options: HealOptions,
    trained: int,
    cut: Collection[SublayerRef] = (),
    *,
    held_out: int | None = None,
    read_again: int = 0,
) -> HealingMemory:
    """About how much memory the training or the fold of a model takes.

    Args:
        model: A transformers model.
        options: How it is healed.
        trained: How many numbers are trained; 0 for a fold.
        cut: The branches that are dropped; empty where they aren't known yet.
        held_out: Tokens that a training is stopped by; None: as many as may be of one text.
        read_again: Tokens that a training reads several times.
    """
    most = options.sequence_length * MOST_HELD_OUT // 2
    held_out = most if held_out is None else held_out
    folds = options.kind == "fold" or options.begins_folded
    folded, folding = folding_bytes(model, options, cut) if folds else (0, 0)
    merged = model.num_parameters(exclude_embeddings=True) if trained else 0
    return HealingMemory(
        weights=model.num_parameters() * model.dtype.itemsize,
        folded=folded,
        folding=folding,
        training=_training(model, options, trained, held_out, read_again) if trained else 0,
        measuring=_measuring(model, options, held_out) + merged * model.dtype.itemsize,
    )


def _training(
    model: Any, options: HealOptions, trained: int, held_out: int, read_again: int
) -> int:
    config = model.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    size = 2 if has_fast_bfloat16(training_device(model)) else model.dtype.itemsize
    answer = size * (config.vocab_size if predicts_tokens(model) else width * (layers + 1))
    step = max(options.step_tokens, options.sequence_length)
    kept = sum(min(KEPT_BYTES, tokens * answer) for tokens in (held_out, read_again))
    states = trained * _STATE_BYTES
    found: int = (
        states + step * (layers * width * _ACTIVATIONS * size + _STEP_ANSWERS * answer) + kept
    )
    return found


def _measuring(model: Any, options: HealOptions, held_out: int) -> int:
    """Of a fold also the answers that it is held against before that."""
    if not predicts_tokens(model):
        return 0
    answer = int(model.config.get_text_config().vocab_size * model.dtype.itemsize)
    batch = options.batch_size * options.sequence_length * answer
    kept = min(CHECKED_BYTES, held_out * answer) if options.kind == "fold" else 0
    return _CHECKED_ANSWERS * batch + kept


def free_for_training(model: Any) -> int | None:
    """What is free beside the weights where a model is trained; None where that isn't known."""
    device = training_device(model)
    free = free_bytes(device)
    if free is None or device == model.device:
        return free
    return free - int(model.num_parameters() * model.dtype.itemsize)


def that_fits(
    options: HealOptions, needed: Callable[[HealOptions], int], free: int
) -> HealOptions | None:
    """The options with a smaller step, length, batch and rank, so that no more is needed than free.

    Args:
        options: How it is trained.
        needed: How much memory that takes.
        free: How much there is.

    Returns:
        None where the smallest are too large.
    """
    while needed(options) > free:
        if options.step_tokens <= _SMALLEST_STEP:
            return None
        options = _halved(options)
    return options


def _halved(options: HealOptions) -> HealOptions:
    rank = options.used_rank
    return replace(
        options,
        step_tokens=max(1, options.step_tokens // 2),
        sequence_length=max(2, options.sequence_length // 2),
        batch_size=max(1, options.batch_size // 2),
        rank=None if rank is None else max(1, rank // 2),
    )


def sizes_told(options: HealOptions) -> str:
    """What memory hangs on, as a user gives it."""
    rank = "" if options.used_rank is None else f", --rank {options.used_rank}"
    return (
        f"step_tokens {options.step_tokens}, --sequence-length {options.sequence_length}, "
        f"batch_size {options.batch_size} (of checks){rank}"
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
            f"Memory ran out while the cut was trained ({options.train}, {sizes_told(options)}).",
            f"Try {sizes_told(_halved(options))}"
            + (", or train: adapters." if options.train == "all" else "."),
            code="out-of-memory",
        ) from error


def training_device(model: Any) -> torch.device:
    """Where a model is trained: on this process's GPU where there is one, else where it is."""
    import torch

    if model.device.type != "cpu" or not torch.cuda.is_available():
        found: torch.device = model.device
        return found
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
