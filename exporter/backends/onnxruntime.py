"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from exporter.backends.base import Array, BoundCall, TensorSpec
from exporter.errors import BackendError
from exporter.optional import require

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Short names of the execution providers that this backend knows."""

_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
_ONLY_FATAL = 4  # the log severity that leaves errors to the exceptions
_LOAD_FAILURES = (
    (
        re.compile(r"Protobuf parsing failed|No graph was found"),
        "{path} is not a complete ONNX file.",
        "It may be cut off: export or copy it again.",
    ),
    (
        re.compile(r"External data path does not exist"),
        "{path}: its external data is missing ({reason}).",
        "Copy the data file beside the ONNX file.",
    ),
    (
        re.compile(r"GetExtDataFromTensorProto|External initializer"),
        "{path}: its external data is shorter than the graph says.",
        "The data file may be cut off: export or copy it again.",
    ),
    (
        re.compile(r"External data path|escapes|outside"),
        "{path}: its external data can't be used ({reason}).",
        "The data must be a plain file in the model's folder.",
    ),
    (
        re.compile(r"released onnx opset|IR version|No Op registered"),
        "{path} needs more than onnxruntime {version} offers: {reason}",
        "Update onnxruntime, or export at an older opset.",
    ),
)


class OnnxRuntimeRunner:
    """One ONNX file in one ONNX Runtime session; see :class:`exporter.backends.base.Runner`."""

    backend = "onnxruntime"

    def __init__(self, model: Path, *, provider: str = "cpu", threads: int) -> None:
        """Notes what to load; nothing is read before ``__enter__``.

        Args:
            model: The ONNX file.
            provider: ``cpu`` or ``cuda``.
            threads: Threads for one operator; operators run one after the other.

        Raises:
            BackendError: For a provider that this backend doesn't know.
        """
        if provider not in PROVIDERS:
            raise BackendError(
                f"The provider {provider!r} is not known.", f"Choose from: {', '.join(PROVIDERS)}."
            )
        self._model = model
        self._short_name = provider
        self._session: Any = None
        self.provider = PROVIDERS[provider]
        self.threads = threads

    def __enter__(self) -> Self:
        """Creates the session and makes sure that it runs where it was asked to.

        Raises:
            BackendError: When the file can't be loaded or the provider doesn't run.
            MissingDependencyError: Without onnxruntime.
        """
        self._ort = require("onnxruntime", extra=_EXTRAS[self._short_name])
        self._refuse_missing_provider()
        if not self._model.is_file():
            raise BackendError(f"The ONNX file {self._model} does not exist.")
        with self._load_errors():
            session = self._ort.InferenceSession(
                str(self._model), self._session_options(), providers=self._wanted_providers()
            )
        running = session.get_providers()[0]
        if running != self.provider:
            raise BackendError(
                f"{self.provider} was asked for, but {running} would run {self._model}.",
                "Check the driver and the CUDA libraries; depthcut doesn't fall back.",
            )
        self._session = session
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Frees the session."""
        self._session = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, in the graph's order."""
        return tuple(self._spec(value) for value in self._loaded().get_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in the graph's order."""
        return tuple(self._spec(value) for value in self._loaded().get_outputs())

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Runs once and returns the named outputs, or all of them, as arrays on the host.

        Raises:
            BackendError: When the run fails.
        """
        names = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
        session, binding = self._loaded(), self._bound_inputs(inputs)
        for name in names:
            binding.bind_output(name, "cpu")
        with self._run_errors():
            session.run_with_iobinding(binding)
            arrays = [self._host_array(value) for value in binding.get_outputs()]
        return dict(zip(names, arrays, strict=True))

    def prepare(self, inputs: Mapping[str, Array]) -> BoundCall:
        """Binds the inputs on the device, and outputs that each call overwrites.

        Raises:
            BackendError: When the first run fails.
        """
        session, binding = self._loaded(), self._bound_inputs(inputs)
        names = [spec.name for spec in self.outputs]
        for name in names:
            binding.bind_output(name, self._device)
        with self._run_errors():
            session.run_with_iobinding(binding)
        # Bound again as values, the first run's outputs are the buffers of all later runs.
        for name, value in zip(names, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        run = session.run_with_iobinding
        return lambda: run(binding)

    @property
    def _device(self) -> str:
        return self._short_name

    def _loaded(self) -> Any:
        if self._session is None:
            raise BackendError(f"The runner of {self._model} is used outside its with block.")
        return self._session

    def _refuse_missing_provider(self) -> None:
        present = self._ort.get_available_providers()
        if self.provider not in present:
            raise BackendError(
                f"{self.provider} was asked for; this onnxruntime has {', '.join(present)}.",
                "pip uninstall onnxruntime, then pip install 'depthcut[gpu]': "
                "the two packages can't live together.",
            )

    def _wanted_providers(self) -> list[str]:
        # CUDA leaves the arithmetic on shapes to the CPU, so that one is always there.
        return list(dict.fromkeys([self.provider, PROVIDERS["cpu"]]))

    def _session_options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = _ONLY_FATAL
        return options

    def _bound_inputs(self, inputs: Mapping[str, Array]) -> Any:
        session = self._loaded()
        missing = [spec.name for spec in self.inputs if spec.name not in inputs]
        if missing:
            raise BackendError(f"{self._model}: no value for the input {missing[0]}.")
        binding = session.io_binding()
        for spec in self.inputs:
            array = np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype)
            binding.bind_ortvalue_input(spec.name, self._device_value(array))
        return binding

    def _device_value(self, array: Array) -> Any:
        if array.dtype == _bfloat16():
            import onnx

            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                array, onnx.TensorProto.BFLOAT16
            )
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device)

    def _host_array(self, value: Any) -> Array:
        array: Array = value.numpy()
        return array

    def _spec(self, value: Any) -> TensorSpec:
        shape = tuple(value.shape or ())
        return TensorSpec(value.name, self._dtype(value), shape)

    def _dtype(self, value: Any) -> np.dtype[Any]:
        inner = value.type.removeprefix("tensor(").removesuffix(")")
        names = {"float": "float32", "double": "float64"}
        if inner == "bfloat16":
            return _bfloat16()
        try:
            dtype: np.dtype[Any] = np.dtype(names.get(inner, inner))
        except TypeError:
            raise BackendError(
                f"{self._model}: {value.name} has the type {value.type}, "
                "which depthcut can't fill or read."
            ) from None
        return dtype

    @contextmanager
    def _load_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
            raise self._load_error(str(error)) from error

    def _load_error(self, text: str) -> BackendError:
        reason = _first_sentence(text)
        for pattern, message, hint in _LOAD_FAILURES:
            if pattern.search(text):
                values = {"path": self._model, "reason": reason, "version": self._ort.__version__}
                return BackendError(message.format(**values), hint)
        return BackendError(f"ONNX Runtime can't load {self._model}: {reason}")

    @contextmanager
    def _run_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed while it ran {self._model}: {_first_sentence(str(error))}"
            ) from error


def _bfloat16() -> np.dtype[Any]:
    import ml_dtypes  # comes with onnx

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _first_sentence(text: str) -> str:
    """ONNX Runtime's message without its codes, source places and later lines."""
    text = text.strip().splitlines()[0] if text.strip() else "no reason given"
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:\s*", "", text)
    text = re.sub(r"\S*/onnxruntime\S*:\d+ [^)]*\)(?: const)?\s*", "", text)
    text = re.sub(r"\w+\.cc:\d+ \w+ ", "", text)
    return text if len(text) <= 300 else text[:297] + "..."
