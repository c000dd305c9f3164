"""What branches read and what they add to the stream, token by token, while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import HealingError
from exporter.models.ablation.branch_replacements import first_input
from exporter.models.anatomy.architectures import SublayerModules
from exporter.models.anatomy.residual_stream import first_tensor, hooked

if TYPE_CHECKING:
    import torch

Branch = Callable[[SublayerModules, "torch.Tensor", "torch.Tensor"], None]
"""Takes a branch, what it read and what it added, both ``[batch, tokens, width]``."""

_FEWEST_SAMPLES = 5


def observing(
    parts: Sequence[SublayerModules], shape: tuple[int, ...], listener: Branch
) -> contextlib.AbstractContextManager[None]:
    """Tells of each named branch in each forward pass inside the block; no hook is left behind.

    Args:
        parts: The branches.
        shape: Batch and tokens of the passes: some families flatten them on the way.
        listener: Called after each branch, with what it adds, its multiplier included.
    """
    return hooked(handle for part in parts for handle in _hooks(part, shape, listener))


def _hooks(part: SublayerModules, shape: tuple[int, ...], listener: Branch) -> Iterator[Any]:
    read: list[torch.Tensor] = []

    def remember(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy: some layers go on adding to this very tensor.
        read[:] = [first_input(args, kwargs).clone()]

    def tell(_module: Any, _inputs: Any, output: Any) -> None:
        x, y = (
            each if part.reads_sources else each.reshape(*shape, -1)
            for each in (read.pop(), first_tensor(output))
        )
        listener(part, x, y * part.multiplier)

    yield part.reads.register_forward_pre_hook(remember, with_kwargs=True)
    yield part.contribution.register_forward_hook(tell)


def check_finite(
    part: SublayerModules, what: Sequence[torch.Tensor], mask: torch.Tensor, first_sample: int
) -> None:
    """Refuses activations that are NaN or infinite where a token is.

    Args:
        part: The branch, for the message.
        what: Activations ``[batch, tokens, width]``.
        mask: ``[batch, tokens]``, boolean; False marks padding.
        first_sample: The number of the batch's first sample.

    Raises:
        HealingError: With layer and sample.
    """
    for tensor in what:
        bad = (~tensor.isfinite().all(-1) & mask).any(-1)
        if bool(bad.any()):
            sample = first_sample + int(bad.int().argmax())
            raise HealingError(
                f"The activations of the {part.kind} of layer {part.layer} are not finite in "
                f"sample {sample}.",
                "Load the model in float32, or check its weights.",
                code="not-finite",
            )


def held_out_tokens(mask: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Which tokens a ridge is judged on: whole samples, spread evenly over the text.

    A text of fewer than five samples holds out the end of each one.

    Args:
        mask: ``[samples, tokens]``; False marks padding.
        share: About how much of it, above 0 and below 1.

    Returns:
        ``[samples, tokens]``; True where a token is held out.

    Raises:
        HealingError: When the share is none, or the text too short to be parted so.
    """
    if not 0 < share < 1:
        raise HealingError(
            f"A share of {share} can't be held out.",
            "Give one such as 0.2.",
            code="share-out-of-range",
        )
    numbers = np.arange(1, len(mask) + 1)
    chosen = np.floor(numbers * share) > np.floor((numbers - 1) * share)
    if len(mask) >= _FEWEST_SAMPLES and 0 < chosen.sum() < len(mask):
        found: NDArray[np.bool_] = mask & chosen[:, None]
    else:
        order, lengths = mask.cumsum(1), mask.sum(1, keepdims=True)
        found = mask & (order > np.ceil(lengths * (1 - share)))
    if not found.any() or not (mask & ~found).any():
        raise HealingError(
            f"{int(mask.sum())} tokens are too few to fit a replacement and to judge it on others.",
            "Give more to calibrate on (--samples).",
            code="too-few-tokens",
        )
    return found
