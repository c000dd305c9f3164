"""A cut model as a benchmark holds it: what is gone, and what else is changed for that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exporter.artifacts.replacement_file import ChangedWeight
from exporter.models.ablation.branch_replacements import (
    BranchReplacement,
    branches_replaced,
    without_branches,
)
from exporter.models.architectures import layer_modules
from exporter.models.changed_weights import change_weights
from exporter.models.residual_stream import hooked
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Patch:
    """What the stream goes through somewhere."""

    factor: torch.Tensor
    shift: torch.Tensor | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it takes time; a number can be folded into the weights before."""
        return self.factor.ndim > 0

    def __call__(self, stream: torch.Tensor) -> torch.Tensor:
        """The stream behind it, ``[..., hidden]``."""
        factor = self.factor.to(stream)
        found = stream @ factor if self.is_matrix else stream * factor
        return found if self.shift is None else found + self.shift.to(stream)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cut model."""

    cut: Mapping[SublayerRef, BranchReplacement] = field(default_factory=dict)
    patches: Mapping[int, Patch] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def without_blocks(cls, model: Any, layers: Iterable[int], **more: Any) -> Candidate:
        """A model without some whole blocks."""
        return cls(without_branches([(layer, "block") for layer in layers], model), **more)

    @contextlib.contextmanager
    def within(self, model: Any) -> Iterator[None]:
        """Gives a model all but the cut itself while the block runs."""
        parameters = dict(model.named_parameters())
        old = {name: parameters[name].data for name in self.weights}
        try:
            for name, value in self.weights.items():
                parameters[name].data = value
            with hooked(self.patched(model)):
                yield
        finally:
            for name, value in old.items():
                parameters[name].data = value

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Makes a model this candidate while the block runs."""
        with self.within(model), branches_replaced(model, self.cut):
            yield

    def patched(self, model: Any) -> Iterator[Any]:
        """Registers the hooks that patch the stream."""
        layers = layer_modules(model)
        for number, patch in self.patches.items():
            yield layers[number].layer.register_forward_pre_hook(_through(patch))


WHOLE = Candidate()
"""The model as it is."""


def new_values(model: Any, changes: Mapping[str, ChangedWeight]) -> dict[str, torch.Tensor]:
    """The values that changed weights would have; the model keeps its own."""
    parameters = dict(model.named_parameters())
    old = {name: parameters[name].data for name in changes}
    try:
        change_weights(model, changes)
        return {name: parameters[name].data for name in changes}
    finally:
        for name, value in old.items():
            parameters[name].data = value


def _through(patch: Patch) -> Any:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> Any:
        return (patch(inputs[0]), *inputs[1:])

    return hook
