"""OpenVINO on the CPU: the ONNX file as it is, its caches as inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from exporter.artifacts.latency import Phase
from exporter.engines.runners.base import (
    Array,
    BoundCall,
    Capabilities,
    Runner,
    move_to_huge_pages,
    refuse_cuda,
)
from exporter.engines.runners.cache_form import CacheForm, has_fixed_length, read_cache_form
from exporter.engines.tensors import TensorSpec, numpy_dtype
from exporter.errors import BackendError, first_line, pass_on_memory_error
from exporter.optional import require

_DEVICE = "CPU"
_EXPORT = "Export it in the portable form (depthcut export --target portable), or run it elsewhere."


class OpenVinoRunner(Runner):
    """One ONNX file, compiled by OpenVINO.

    On the CPU its memory is moved to huge pages, as that of the arms that it stands beside.
    """

    backend = "openvino"

    def __init__(self, model: Path, *, provider: str = "cpu", threads: int) -> None:
        refuse_cuda(self.backend, provider)
        self.model, self.name = model, str(model)
        self.provider, self.threads = _DEVICE, threads
        self._compiled: Any = None
        self._request: Any = None
        self._held: list[Array] = []

    def __enter__(self) -> Self:
        """Compiles the model."""
        self._library = require("openvino", extra="openvino")
        if not self.model.is_file():
            raise BackendError(f"The ONNX file {self.model} does not exist.", code="file-missing")
        try:
            core = self._library.Core()
            graph = core.read_model(str(self.model))
            self._compiled = core.compile_model(graph, _DEVICE, _settings(self.threads))
        except Exception as error:  # the library has no class of its own
            pass_on_memory_error(error)
            raise self._load_error(error) from error
        try:
            self._refuse_in_place()
        except BaseException:
            self._compiled = None
            raise
        self._request = self._compiled.create_infer_request()
        self.capabilities = replace(Capabilities(), huge_page_bytes=move_to_huge_pages())
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees the model."""
        self._request = self._compiled = None
        self._held = []

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, in the graph's order."""
        return tuple(self._spec(end) for end in self._loaded().inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in the graph's order."""
        return tuple(self._spec(end) for end in self._loaded().outputs)

    @cached_property
    def _form(self) -> CacheForm:
        return read_cache_form(self.model)

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        """Runs once and returns copies of the named outputs, or of all of them."""
        names = [spec.name for spec in self.outputs] if outputs is None else outputs
        self._held = self._bind(self._request, inputs)  # the request only borrows their memory
        with self._run_errors():
            self._request.infer()
        return {name: np.array(self._request.get_tensor(name).data) for name in names}

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Binds the inputs to a request of its own, whose outputs each call overwrites."""
        request = self._loaded().create_infer_request()
        held = self._bind(request, inputs)

        def call(_held: list[Array] = held) -> None:  # the request only borrows their memory
            with self._run_errors():
                request.infer()

        call()
        return BoundCall(call)

    def _bind(self, request: Any, inputs: Mapping[str, Array]) -> list[Array]:
        self._loaded()
        self.refuse_missing(inputs)
        arrays = []
        with self._run_errors():
            for spec in self.inputs:
                array = np.ascontiguousarray(inputs[spec.name], spec.dtype)
                request.set_tensor(spec.name, self._library.Tensor(array, shared_memory=True))
                arrays.append(array)
        return arrays

    def _refuse_in_place(self) -> None:
        """A cache that is past and present in one buffer is ONNX Runtime's and TensorRT's form."""
        if self._form.shared or any(map(has_fixed_length, self.inputs)):
            raise BackendError(
                f"{self.model} keeps past and present in one buffer, a form for other runtimes.",
                _EXPORT,
                code="load-failed",
            )

    def _loaded(self) -> Any:
        if self._compiled is None:
            raise self.not_entered()
        return self._compiled

    def _spec(self, end: Any) -> TensorSpec:
        kind = end.element_type
        if kind.get_type_name() == "bf16":  # to numpy it is called float16, with other bits
            raise BackendError(
                f"{self.model}: {end.any_name} is bfloat16, which OpenVINO gives Python no "
                "arrays of.",
                "Export it in float32 or float16.",
                code="unknown-input",
            )
        dtype = numpy_dtype(kind.to_dtype().name, f"{self.model}: {end.any_name}")
        sizes = [None if size.is_dynamic else size.get_length() for size in end.partial_shape]
        return TensorSpec(end.any_name, dtype, tuple(sizes))

    def _load_error(self, error: Exception) -> BackendError:
        return BackendError(
            f"OpenVINO {self._library.__version__} can't load {self.model}: {_told(error)}",
            _EXPORT,
            code="load-failed",
        )

    @contextmanager
    def _run_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            pass_on_memory_error(error)
            raise BackendError(
                f"OpenVINO failed while it ran {self.model}: {_told(error)}", code="run-failed"
            ) from error


def _settings(threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }


def _told(error: Exception) -> str:
    """The last line of a message whose first ones name places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)
