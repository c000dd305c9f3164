"""Gives the weights of an exported graph new values, which spares another export of the model."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from exporter.export.onnx_output import save_onnx
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import load_model
from graph_passes.files.weight_file import read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Content = tuple[tuple[int, ...], bytes]
"""A tensor's shape, and the SHA-256 of its bytes."""


@dataclass(frozen=True)
class WeightPlace:
    """An initializer that holds a parameter of the model."""

    initializer: str
    parameter: str
    transposed: bool  # whether the graph has it as `[in, out]` where the model has `[out, in]`


def weight_places(
    graph: Path, model: PreTrainedModel, names: Collection[str]
) -> list[WeightPlace] | None:
    """Finds parameters in a graph that was exported from the model."""
    parameters = dict(model.named_parameters())
    if any(parameters[name].min() == parameters[name].max() for name in names):
        return None
    shapes = {tuple(parameters[name].shape) for name in names}
    shapes |= {shape[::-1] for shape in shapes}
    held = _initializers(load_model(graph), shapes)
    found: list[WeightPlace] = []
    for transposed in (False, True):
        for content, alike in _by_content(parameters, shapes, transposed=transposed).items():
            if not held[content] or set(names).isdisjoint(alike):
                continue
            owners = {each: _owner(each, alike) for each in held[content]}
            if len(alike) > 1 and set(owners.values()) != set(alike):
                return None
            found += [WeightPlace(each, name, transposed) for each, name in owners.items()]
    wanted = [place for place in found if place.parameter in names]
    return wanted if {place.parameter for place in wanted} == set(names) else None


def write_with_weights(
    graph: Path,
    folder: Path,
    model: PreTrainedModel,
    places: Sequence[WeightPlace],
    progress: Progress = QUIET,  # hears how many bytes are written
) -> Path:
    """Writes a graph with the values that a model's parameters have now."""
    found, parameters = load_model(graph), dict(model.named_parameters())
    for place in places:
        value = _oriented(parameters[place.parameter], transposed=place.transposed)
        tensor = TorchTensor(value, name=place.initializer)
        found.graph.initializers[place.initializer].const_value = tensor
    return save_onnx(found, folder, progress=progress)


def _initializers(model: ir.Model, shapes: set[tuple[int, ...]]) -> dict[_Content, list[str]]:
    """The names of those of some shapes, by what is in them."""
    found: defaultdict[_Content, list[str]] = defaultdict(list)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        shape = () if tensor is None else tuple(tensor.shape.numpy())
        if tensor is not None and shape in shapes:
            data = read_bytes(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.tobytes()
            found[shape, hashlib.sha256(data).digest()].append(name)
    return found


def _by_content(
    parameters: dict[str, torch.nn.Parameter], shapes: set[tuple[int, ...]], *, transposed: bool
) -> dict[_Content, list[str]]:
    """The names of parameters of some shapes, by what is in them as a graph would have it."""
    found: defaultdict[_Content, list[str]] = defaultdict(list)
    for name, each in parameters.items():
        if tuple(each.shape) in shapes and not (transposed and each.ndim < 2):
            value = _oriented(each, transposed=transposed)
            data: Any = value.reshape(-1).view(torch.uint8).numpy()
            found[tuple(value.shape), hashlib.sha256(data).digest()].append(name)
    return found


def _oriented(parameter: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """A parameter's value as it lies in a graph, ``[out, in]`` or ``[in, out]``."""
    value = parameter.detach().cpu()
    return (value.T if transposed else value).contiguous()


def _owner(initializer: str, alike: Sequence[str]) -> str:
    """Whose an initializer is; of parameters with equal values the one that it is named after."""
    if len(alike) == 1:
        return alike[0]
    return next((name for name in alike if initializer.startswith(name)), "")
