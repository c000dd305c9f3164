"""Parameters without content that pass for ones on the CPU while a model is traced.

On PyTorch's meta device a model can't be traced: its buffers and inputs are on the CPU, and no
operator takes both. PyTorch's fake tensors say that they are on the CPU and have no content.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from exporter.export.exportable_experts import exportable_experts
from exporter.models.onnx_interface import OnnxInterface, interface_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def pretended(model: torch.nn.Module) -> Iterator[FakeTensorMode]:
    """Puts fake parameters in the places of those on the meta device while the block runs.

    Ties stay ties. Parameters with content and buffers stay as they are.

    Args:
        model: Whole, in part, or not at all on the meta device.

    Yields:
        The mode of the fake parameters, in which the model can be run.
    """
    # Real inputs are let in: the buffers are real.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    fakes = {id(parameter): _fake(parameter, mode) for _, _, parameter in places}
    try:
        for module, name, parameter in places:
            module._parameters[name] = fakes[id(parameter)]
        yield mode
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def interface_without_weights(model: PreTrainedModel) -> OnnxInterface:
    """A model's interface as :func:`exporter.models.onnx_interface.interface_of` finds it.

    Args:
        model: With its weights, or without.

    Raises:
        ExportError: When the model doesn't keep plain keys and values, or can't run on tokens.
    """
    if not is_hollow(model):
        return interface_of(model)
    with exportable_experts(model), pretended(model) as mode, mode:
        return interface_of(model)


def is_hollow(model: torch.nn.Module) -> bool:
    """Whether some of a model's parameters have no content."""
    return any(parameter.is_meta for parameter in model.parameters())


def is_fake(tensor: Any) -> bool:
    """Whether a tensor is one of a fake mode."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _fake(parameter: torch.nn.Parameter, mode: FakeTensorMode) -> torch.nn.Parameter:
    with mode:
        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
        return torch.nn.Parameter(empty, requires_grad=False)
