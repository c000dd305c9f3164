"""What a graph kind is made of: files, and the steps in which they are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Axes = dict[str, dict[int, str]]

BATCH, PADDED = 2, 2
PROMPT, TOTAL = 6, 7  # tokens before the last one, and with it


@dataclass
class Part:
    """One exported file."""

    name: str
    module: torch.nn.Module
    outputs: list[str]
    example: Tensors = field(default_factory=dict)
    dynamic: Axes = field(default_factory=dict)


@dataclass
class Step:
    """One run."""

    phase: str
    part: int
    inputs: Tensors
    carried: dict[str, str] = field(default_factory=dict)
    real: torch.Tensor | None = None
    cached: torch.Tensor | None = None
    source: torch.Tensor | None = None


@dataclass
class Subject:
    """A model as one or several graphs, and the steps that show what they compute."""

    parts: list[Part]
    steps: list[Step]


class Forward(torch.nn.Module):
    """A function of a model and its inputs as a module."""

    def __init__(self, model: Any, function: Callable[[Any, Tensors], list[torch.Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, inputs: Tensors) -> list[torch.Tensor]:
        return self.function(self.model, inputs)


def random_ids(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    """Ids ``[batch, length]`` of no special tokens, which come first in most vocabularies."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(6, vocabulary, (BATCH, length), generator=generator)


def noise(*shape: int) -> torch.Tensor:
    """A picture or a sound."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def padded_mask(length: int, *, left: bool) -> torch.Tensor:
    """Ones ``[batch, length]``; the second row is padded."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, slice(0, PADDED) if left else slice(length - PADDED, length)] = 0
    return mask
