"""Runs a model one layer at a time over a whole text, and keeps the stream between two layers.

Each layer is run for all samples before the next one: what is fitted in a layer is known before
anything above it is run, at the cost of one run of the model, not of one for each fit.
No knowledge of a family's way of calling its layers is needed: the model's own forward runs, with
the layers below handing out the kept stream and those above passing it on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.ablation.streams import forward_of, giving
from exporter.models.anatomy.architectures import layer_modules
from exporter.models.anatomy.residual_stream import LayerStates, run_backbone, tapped
from exporter.scratch import scratch_folder

if TYPE_CHECKING:
    import torch


class Shelf:
    """Tensors by number, in memory up to a limit and on disk beyond it.

    Use it as a context manager: the files go when the block ends.

    Args:
        limit_bytes: Of memory.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: dict[int, Any] = {}
        self._folder: Path | None = None
        self._leave = contextlib.ExitStack()

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_error: object) -> None:
        self._kept.clear()
        self._leave.close()

    def __setitem__(self, number: int, what: Any) -> None:
        import torch

        self._kept.pop(number, None)
        if _bytes(what) + sum(map(_bytes, self._kept.values())) <= self._limit:
            self._kept[number] = what
            return
        if self._folder is None:
            self._folder = self._leave.enter_context(scratch_folder("healing"))
        torch.save(what, self._path(number))

    def __getitem__(self, number: int) -> Any:
        import torch

        if number in self._kept:
            return self._kept[number]
        return torch.load(self._path(number), weights_only=True)

    def _path(self, number: int) -> Path:
        assert self._folder is not None, "nothing was kept on disk"
        return self._folder / f"{number}.pt"


class LayerWalk:
    """A text inside a model, in front of some layer.

    Args:
        model: A transformers model.
        input_ids: ``[samples, tokens]``, int64.
        mask: ``[samples, tokens]``, boolean; False marks padding.
        batch_size: Samples in one forward pass.

    Attributes:
        batches: For each batch its rows.
    """

    def __init__(
        self, model: Any, input_ids: NDArray[np.int64], mask: NDArray[np.bool_], batch_size: int
    ) -> None:
        self._model, self._layers = model, layer_modules(model)
        self._ids, self._mask = input_ids, mask
        starts = range(0, len(input_ids), batch_size)
        self.batches = [slice(start, start + batch_size) for start in starts]

    def run(self, layer: int, rows: slice, below: Any) -> tuple[LayerStates, Any]:
        """Runs one layer for one batch.

        Args:
            layer: Its number.
            rows: Of the batch.
            below: What the layer below returned; anything for layer 0.

        Returns:
            The states around the layer's sublayers, and what it returned.
        """
        states: list[LayerStates] = []
        outputs: list[Any] = []

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.append(output)

        with contextlib.ExitStack() as stack:
            for modules in self._layers[:layer]:
                stack.enter_context(forward_of(modules.layer, giving(below)))
            stack.enter_context(tapped([self._layers[layer]], states.append))
            stack.callback(self._layers[layer].layer.register_forward_hook(keep).remove)
            for modules in self._layers[layer + 1 :]:
                stack.enter_context(forward_of(modules.layer, lambda *_a, **_k: outputs[0]))
            run_backbone(self._model, self._inputs(rows))
        return states[0], outputs[0]

    def _inputs(self, rows: slice) -> dict[str, torch.Tensor]:
        import torch

        device = self._model.device
        mask = torch.from_numpy(self._mask[rows]).to(device)
        ids = torch.from_numpy(self._ids[rows]).to(device)
        return {"input_ids": ids, "attention_mask": mask.long()}


def _bytes(what: Any) -> int:
    tensors: Iterator[Any] = iter(what if isinstance(what, tuple) else (what,))
    return sum(t.numel() * t.element_size() for t in tensors if hasattr(t, "numel"))
