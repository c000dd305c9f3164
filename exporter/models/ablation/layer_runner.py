"""Runs one layer of a model through the model's own forward, whatever the family.

The layers below hand out what is known, the layers above hand out what the layer gave, and what the
model makes beside them (masks, rotary tables, its last norm) is made as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from exporter.models.ablation.streams import forward_of
from exporter.models.anatomy.residual_stream import LayerModules, first_tensor, run_backbone

if TYPE_CHECKING:
    import torch


class LayerRunner:
    """A model of which one layer at a time has its weights."""

    def __init__(self, model: Any, layers: Sequence[LayerModules]) -> None:
        self._model, self._layers = model, layers
        self._returned = 0  # how many things a layer returns; 0 for a bare tensor
        self._now: Any = None

    @contextlib.contextmanager
    def only(self, number: int | None) -> Iterator[None]:
        """Runs that layer alone while the block runs; None: no layer at all."""
        with contextlib.ExitStack() as stack:
            for modules in self._layers:
                if modules.number == number:
                    handle = modules.layer.register_forward_hook(self._keep)
                    stack.callback(handle.remove)
                else:
                    stack.enter_context(forward_of(modules.layer, self._hand_out))
            yield

    def run(self, inputs: dict[str, torch.Tensor], given: torch.Tensor | None) -> torch.Tensor:
        """Runs the layer that :meth:`only` names.

        Args:
            inputs: What the model is called with.
            given: What the layer below gave, ``[batch, tokens, hidden]``; None for the first.

        Returns:
            What the layer gives, ``[batch, tokens, hidden]``.
        """
        self._give(given)
        run_backbone(self._model, inputs)
        output = first_tensor(self._now)
        self._now = None
        return output

    def logits(self, inputs: dict[str, torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        """What the model's head makes of the last layer's output; within ``only(None)``."""
        import torch

        self._give(given)
        with torch.inference_mode():
            logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
        self._now = None
        return logits

    @contextlib.contextmanager
    def without_embedding(self) -> Iterator[None]:
        """Lets the input embedding hand out zeros while the block runs, so that it can go.

        Only the first layer reads what it gives; behind it, the tensor's form is all that counts.
        """
        import torch

        embedding = self._model.get_input_embeddings()
        dtype, width = embedding.weight.dtype, embedding.weight.shape[-1]

        def zeros(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros((), dtype=dtype, device=ids.device).expand(*ids.shape, width)

        with forward_of(embedding, zeros):
            yield

    def _give(self, given: torch.Tensor | None) -> None:
        self._now = (given, *[None] * (self._returned - 1)) if self._returned else given

    def _hand_out(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._now

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._returned = len(output) if isinstance(output, tuple) else 0
        self._now = output
