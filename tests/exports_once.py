"""PyTorch's exporter asked once for each model, however many tests of a run export it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_LARGEST_BYTES = 8 * 2**20
_PLAIN = (bool, int, float, str, tuple, type(None))
# Where a model was loaded from, how it began, and how it samples: nothing of that is traced.
_UNSEEN = (
    *("name_or_path", "_name_or_path", "initializer_range", "generation_config"),
    # What loading adds to a model that was made, of which modules and weights tell the same.
    *("_use_kernels", "architectures", "dtype", "model_type", "transformers_version"),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class ExportsOnce:
    """Stands in for ``torch.onnx.export`` and keeps what it gave, in files for all processes.

    A trace that isn't optimised holds parameters by their names and nothing that was computed of
    them: a model of the same form is given the trace with its own.
    """

    def __init__(self, export: Callable[..., Any], folder: Path) -> None:
        self.real = export
        self._folder = folder

    def __call__(self, model: Any, *arguments: Any, **options: Any) -> Any:
        is_bare = not arguments and "f" not in options and options.get("optimize") is False
        key = key_of(model, options) if is_bare else None
        if key is None:
            return self.real(model, *arguments, **options)
        kept = self._folder / f"{key}.onnx"
        if kept.exists():
            return _program(kept.read_bytes(), model)
        program = self.real(model, **options)
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_bytes(_serialised(program))
        written.replace(kept)
        return program


def keep_operators() -> None:
    """Lets an exporter that is loaded read its table once: a second or two of each export."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(module, "ONNXRegistry", None)
    made = getattr(registry, "from_torchlib", None)
    if made is not None and not hasattr(made, "cache_info"):
        registry.from_torchlib = staticmethod(functools.cache(made))  # type: ignore[union-attr]


def key_of(model: Any, options: dict[str, Any]) -> str | None:
    """What tells an export from others; None where nothing does, or the model is large."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if sum(tensor.nbytes for _, tensor in tensors) > _LARGEST_BYTES:
        return None
    if any(not _has_content(tensor) for _, tensor in tensors):
        return None
    if any(
        "forward" in vars(part) or any(vars(part)[h] for h in _HOOKS) for part in model.modules()
    ):
        return None
    digest, ties = hashlib.sha256(), dict[int, str]()
    for line in [*_modules(model), *_leaves("options", options)]:
        digest.update(line.encode())
    for name, tensor in _parameters(model):
        tie = ties.setdefault(id(tensor), name)
        digest.update(f"{name} {tie} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for name, tensor in model.named_buffers(remove_duplicate=False):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


def _has_content(tensor: Any) -> bool:
    """Not one of the meta device, nor of a subclass without numbers, as streamed weights are."""
    import torch

    return tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)


def _bytes(tensor: Any) -> bytes:
    import torch

    content: bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return content


def _modules(model: Any) -> Iterator[str]:
    for path, part in model.named_modules():
        yield f"{path}: {type(part).__module__}.{type(part).__qualname__} {part.extra_repr()}"
        for name, value in sorted(vars(part).items()):
            if name in _UNSEEN:
                continue
            if hasattr(value, "to_dict"):  # a config, with what it keeps to itself
                settings = {key: var for key, var in vars(value).items() if key not in _UNSEEN}
                yield f"{path}.{name} = {sorted(settings.items())!r}"
            elif isinstance(value, _PLAIN) or dataclasses.is_dataclass(value):
                yield f"{path}.{name} = {value!r}"


def _leaves(path: str, value: Any) -> Iterator[str]:
    """Nested options, a tensor by its dtype and shape."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(f"{path}.{key}", entry)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(f"{path}.{number}", item)
    elif hasattr(value, "shape"):
        yield f"{path} = {value.dtype} {tuple(value.shape)}"
    else:
        yield f"{path} = {value!r}"


def _serialised(program: Any) -> bytes:
    """A copy: the model's weights may be changed afterwards."""
    import onnx_ir as ir

    content: bytes = ir.to_proto(program.model).SerializeToString()
    return content


def _program(content: bytes, model: Any) -> Any:
    import onnx
    import onnx_ir as ir
    import torch

    graph = ir.from_proto(onnx.ModelProto.FromString(content))
    for name, parameter in _parameters(model):
        if name in graph.graph.initializers:
            tensor = ir.tensor_adapters.TorchTensor(parameter.data, name)
            graph.graph.initializers[name].const_value = tensor
    return torch.onnx.ONNXProgram(graph, None)


@pytest.fixture(scope="module")
def exports_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets a file's tests share what PyTorch's exporter made with all files that ask for this."""
    torch = pytest.importorskip("torch")
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "exports"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", ExportsOnce(torch.onnx.export, folder))
        yield
