"""PyTorch, eager or compiled, behind the inputs and outputs of our ONNX files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from exporter.artifacts.latency import Phase
from exporter.engines.runners.base import Array, BoundCall, Capabilities, Runner, move_to_huge_pages
from exporter.engines.tensors import TensorSpec, numpy_dtype
from exporter.errors import BackendError, first_line, pass_on_memory_error
from exporter.models.onnx_interface import InterfaceModule, OnnxInterface, interface_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]
_Forward = Callable[[Tensors, list[torch.Tensor]], list[torch.Tensor]]

_MOST_SHAPES = 64  # of one model; PyTorch's own limit is 8, and it goes on eagerly beyond it
_WARM_CALLS = 2  # the first compiles; what it made runs first in the second


class TorchRunner(Runner):
    """One PyTorch model.

    Inputs and outputs have the names, dtypes and axes that :func:`exporter.export.torch_export`
    gives them. PyTorch makes new outputs at every call, its inputs are made once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compiled: bool,
        provider: str = "cpu",
        threads: int,
        interface: OnnxInterface | None = None,
    ) -> None:
        self.interface = interface or interface_of(model)
        self.backend = "torch.compile" if compiled else "pytorch"
        self.name = type(model).__name__
        self.provider = provider.upper()
        self.threads = threads
        self.capabilities = Capabilities(
            "cpu" if provider == "cpu" else "gpu", "compiled" if compiled else "any"
        )
        self._compiled: _Forward | None = None
        self._compiles = compiled
        self._device = torch.device(provider)
        self._module = InterfaceModule(model, self.interface).eval()
        self._forward: _Forward | None = None
        self._threads_before = torch.get_num_threads()

    def __enter__(self) -> Self:
        """Puts the model on its device and sets the number of threads."""
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise BackendError(
                "PyTorch was asked to run on CUDA and finds no GPU.",
                "Install PyTorch with CUDA, or compare on the CPU.",
            )
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self._module.to(self._device)
        if self._device.type == "cpu":
            moved = move_to_huge_pages()
            self.capabilities = replace(self.capabilities, huge_page_bytes=moved)
        if self._compiles and self._compiled is None:  # kept from one time to the next
            self._compiled = torch.compile(self._module, dynamic=False)
        self._forward = self._compiled if self._compiles else self._module
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Gives back the threads, and the device's memory."""
        self._forward = None
        self._module.to("cpu")
        torch.set_num_threads(self._threads_before)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, tokens first, then keys and values in turn."""
        past = _cache_specs(self.interface, self.interface.past_names, "past_sequence")
        return (*(_token_spec(name, self.interface) for name in self.interface.token_inputs), *past)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, logits or hidden states first."""
        interface = self.interface
        axes = ("batch", None) if interface.per_text else ("batch", "sequence", None)
        main = TensorSpec(interface.main_output, _numpy_dtype(interface.dtype), axes)
        return (main, *_cache_specs(interface, interface.present_names, "total_sequence"))

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        """Runs once and returns the named outputs, or all of them, as arrays on the host."""
        call = self._call(inputs)
        with self._errors():
            result = dict(zip(self.interface.output_names, call(), strict=True))
            names = self.interface.output_names if outputs is None else outputs
            return {name: _to_numpy(result[name]) for name in names}

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Puts the inputs on the device, and runs until everything is compiled."""
        call, on_gpu = self._call(inputs), self._device.type == "cuda"

        def bound() -> None:
            try:
                call()
                if on_gpu:
                    torch.cuda.synchronize()
            except Exception as error:
                raise self._error(error) from error

        for _ in range(_WARM_CALLS):
            with _compiling():
                bound()
        return BoundCall(bound)

    def _call(self, inputs: Mapping[str, Array]) -> Callable[[], list[torch.Tensor]]:
        """One run on inputs that are on the device."""
        forward = self._forward
        if forward is None:
            raise self.not_entered()
        self.refuse_missing(inputs)
        values = {
            spec.name: _to_torch(inputs[spec.name], spec.dtype).to(self._device)
            for spec in self.inputs
        }
        tokens = {name: values[name] for name in self.interface.token_inputs}
        past = [values[name] for name in self.interface.past_names]

        def call() -> list[torch.Tensor]:
            with torch.inference_mode():
                return forward(tokens, past)

        return call

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with _compiling():
                yield
        except Exception as error:  # the model's own code, and a compiler's
            raise self._error(error) from error

    def _error(self, error: Exception) -> BackendError:
        pass_on_memory_error(error)
        name, result = type(self._module.model).__name__, first_line(error)
        if "ompiler" in result:  # PyTorch's words for a machine without one
            return BackendError(
                f"torch.compile can't compile {name}: {result}.",
                "It needs a C++ compiler such as g++ on the CPU; or take torch: for eager PyTorch.",
                code="compiler-missing",
            )
        return BackendError(f"{self.backend} failed on {name}: {result}.", code="run-failed")


def _compiling() -> contextlib.AbstractContextManager[None]:
    """Lets a model be compiled for many shapes, and fail rather than run uncompiled."""
    import torch._dynamo

    patched: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=_MOST_SHAPES, fail_on_recompile_limit_hit=True, suppress_errors=False
    )
    return patched


def _token_spec(name: str, interface: OnnxInterface) -> TensorSpec:
    if interface.image is not None:
        return TensorSpec(name, _numpy_dtype(interface.dtype), ("batch", *interface.image))
    whole = name == "attention_mask" and interface.cache
    return TensorSpec(
        name, np.dtype(np.int64), ("batch", "total_sequence" if whole else "sequence")
    )


def _cache_specs(
    interface: OnnxInterface, names: Sequence[str], length: str
) -> tuple[TensorSpec, ...]:
    dtype = _numpy_dtype(interface.dtype)
    sizes = [(slot.heads, size) for slot in interface.cache for _, size in slot.parts]
    return tuple(
        TensorSpec(name, dtype, ("batch", heads, length, size))
        for name, (heads, size) in zip(names, sizes, strict=True)
    )


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return numpy_dtype(str(dtype).removeprefix("torch."))


def _to_torch(array: Array, dtype: np.dtype[Any]) -> torch.Tensor:
    """A copy of an array; numpy's bfloat16 is unknown to PyTorch and goes by its bits."""
    array = np.array(array, dtype=dtype)
    if dtype == np.dtype("bfloat16"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _to_numpy(tensor: torch.Tensor) -> Array:
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(np.dtype("bfloat16"))
    array: Array = tensor.numpy()
    return array
