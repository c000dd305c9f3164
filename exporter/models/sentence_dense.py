"""The products that sentence-transformers puts behind a pooling: its module Dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from exporter.errors import ModelSourceError, first_line
from exporter.files import sha256_file
from graph_passes.files.reading import check_file
from graph_passes.fusing.pooling import Activation, DenseLayer

WEIGHTS = "model.safetensors"
_ACTIVATIONS: dict[str, Activation] = {
    "Identity": "Identity", "Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid",
}  # fmt: skip
"""PyTorch's names of those that are known, and ONNX's."""
_ARRAYS: dict[Activation, Any] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@dataclass(frozen=True)
class Dense:
    """One product.

    Attributes:
        file: Its weights.
        activation: What follows it.
        sha256: Of the weights.
    """

    file: str
    activation: Activation
    sha256: str

    @property
    def layer(self) -> DenseLayer:
        """Its weights, float32."""
        return _layer(self.file, self.activation, self.sha256)

    def __call__(self, vectors: Any) -> Any:
        """Of ``[..., in]`` ``[..., out]``; of NumPy or of PyTorch."""
        layer = self.layer
        bias = np.zeros(len(layer.weight), np.float32) if layer.bias is None else layer.bias
        if isinstance(vectors, np.ndarray):
            return _ARRAYS[self.activation](vectors @ layer.weight.T + bias)
        import torch

        weight, added = (torch.from_numpy(each).to(vectors) for each in (layer.weight, bias))
        product = vectors @ weight.T + added
        name = self.activation.lower()
        return product if name == "identity" else getattr(torch, name)(product)


def read_dense(folder: Path, config: Mapping[str, Any]) -> Dense:
    """A module Dense.

    Args:
        folder: Its own.
        config: What its ``config.json`` tells.
    """
    named = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if named not in _ACTIVATIONS:
        raise ModelSourceError(
            f"{folder} has the activation {named!r}; known are {', '.join(_ACTIVATIONS)}.",
            "Let sentence-transformers apply this module.",
            code="unknown-activation",
        )
    file = folder / WEIGHTS
    check_file(file)
    if not file.is_file():
        raise ModelSourceError(
            f"{file} is not there, but modules.json lists that module.",
            "Fetch the whole folder; pickled weights (pytorch_model.bin) are not read.",
            code="dense-missing",
        )
    found = Dense(str(file), _ACTIVATIONS[named], sha256_file(file))
    _ = found.layer
    return found


@cache
def _layer(file: str, activation: Activation, _sha256: str) -> DenseLayer:
    try:
        numbers = load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, first_line(error)) from error
    weight, bias = numbers.get("linear.weight"), numbers.get("linear.bias")
    shapes = [None if each is None else each.shape for each in (weight, bias)]
    if weight is None or weight.ndim != 2 or shapes[1] not in (None, weight.shape[:1]):
        raise _unreadable(file, f"linear.weight and linear.bias have the shapes {shapes}")
    return DenseLayer(
        weight.astype(np.float32), None if bias is None else bias.astype(np.float32), activation
    )


def _unreadable(file: str, why: str) -> ModelSourceError:
    return ModelSourceError(
        f"{file} holds no product of vectors: {why}.",
        "Fetch the model again.",
        code="dense-unreadable",
    )
