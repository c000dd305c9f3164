"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import ml_dtypes  # noqa: F401  # numpy knows bfloat16 from its import on
import numpy as np
import onnx

from exporter.artifacts.latency import Phase
from exporter.engines.runners.base import Array, BoundCall, Capabilities, Runner, move_to_huge_pages
from exporter.engines.runners.cache_form import (
    ALONG_TOKENS,
    IDS,
    MASK,
    CacheForm,
    has_fixed_length,
    may_be_cache,
    needs_packing,
    packed,
    read_cache_form,
    run_packed,
    sizes_are_told,
)
from exporter.engines.runners.sessions import (
    CPU,
    PROVIDERS,
    WidenedCopy,
    check_provider,
    first_sentence,
    is_bfloat16,
    lacks_a_kernel,
    load_failure,
    new_session,
    refuse_nodes_on_cpu,
)
from exporter.engines.tensors import TensorSpec, numpy_dtype
from exporter.errors import BackendError
from graph_passes.fusing.logits_to_keep import KEEP

_BFLOAT16 = onnx.TensorProto.BFLOAT16


def device_value(values: Any, array: Array, device: str) -> Any:
    """An array as a value on a device; on the CPU it lies over the array's own memory."""
    if array.dtype != np.dtype("bfloat16"):
        return values.ortvalue_from_numpy(array, device)
    if device == "cpu":
        return values.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return bfloat16_copy(values, array, device)


def bfloat16_copy(values: Any, array: Array, device: str) -> Any:
    """A copy of a bfloat16 array on a device; ``ortvalue_from_numpy`` takes numpy's types alone."""
    value = values.ortvalue_from_shape_and_type(array.shape, _BFLOAT16, device)
    value.update_inplace(array.view(np.uint16))  # it copies bytes
    return value


def host_array(value: Any) -> Array:
    """A value's content; a bfloat16 one must lie on the host, since ``OrtValue.numpy`` lacks it."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    shape = tuple(value.shape())
    words = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(words, np.uint16).reshape(shape).view("bfloat16")


@dataclass(frozen=True)
class BoundInputs:
    """A binding with the arrays whose memory it borrows for as long as it is used."""

    binding: Any
    values: dict[str, Any]
    arrays: list[Array]

    def add(self, name: str, value: Any, array: Array) -> None:
        """Binds one more input."""
        self.values[name] = value
        self.arrays.append(array)
        self.binding.bind_ortvalue_input(name, value)

    def settle(
        self, session: Any, outputs: Sequence[str], shared: Mapping[str, str], device: str
    ) -> None:
        """Runs once; the outputs' buffers are then those of all later runs."""
        for name in outputs:
            if name in shared:
                self.binding.bind_ortvalue_output(name, self.values[shared[name]])
            else:
                self.binding.bind_output(name, device)
        session.run_with_iobinding(self.binding)
        for name, value in zip(outputs, self.binding.get_outputs(), strict=True):
            self.binding.bind_ortvalue_output(name, value)


CHUNK_TOKENS = 256
"""The fewest tokens of a chunk."""


def chunk_tokens(specs: Sequence[TensorSpec], form: CacheForm) -> int:
    """The fewest tokens of a chunk of a graph's prompts; 0 where they have to run whole."""
    known = {MASK, *ALONG_TOKENS, *form.shared}
    fits = form.sums_mask and not form.windows and {spec.name for spec in specs} <= known
    return CHUNK_TOKENS if fits else 0


def chunks(new: int, least: int) -> list[slice]:
    """Where a prompt is cut: into as many equal parts as have so many tokens."""
    count = max(1, new // least) if least else 1
    ends = [new * number // count for number in range(count + 1)]
    return [slice(*span) for span in pairwise(ends)]


def in_chunks(inputs: Mapping[str, Array], least: int) -> list[dict[str, Array]]:
    """The calls that do what one call does; only the last one's logits are the call's."""
    whole = [dict(inputs)]
    if not least or IDS not in inputs or MASK not in inputs:
        return whole
    (batch, new), mask = inputs[IDS].shape, inputs[MASK]
    if batch > 1 or not np.all(mask):
        return whole
    past = mask.shape[1] - new
    along = [name for name in ALONG_TOKENS if name in inputs]
    return [
        {
            **inputs,
            **{name: inputs[name][:, span] for name in along},
            MASK: mask[:, : past + span.stop],
        }
        for span in chunks(new, least)
    ]


class OnnxRuntimeRunner(Runner):
    """One ONNX file in one ONNX Runtime session.

    The CPU has no kernels for bfloat16: a graph that can't be run for want of them is run as a copy
    in float32. On the CPU its memory is moved to huge pages, and long prompts run in chunks. Its
    ``capabilities`` say so.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        model: Path,
        *,
        provider: str = "cpu",
        threads: int,
        thrifty: bool = False,
        brief: bool = False,
    ) -> None:
        """Notes what to load; nothing is read before ``__enter__``."""
        if provider not in PROVIDERS:
            raise BackendError(
                f"The provider {provider!r} is not known.",
                f"Choose from: {', '.join(PROVIDERS)}.",
                code="unknown-provider",
            )
        self.model, self.name = model, str(model)
        self._short_name = provider
        self._session: Any = None
        self._copy: WidenedCopy | None = None
        self.provider = PROVIDERS[provider]
        self.threads = threads
        self._thrifty, self._moves = thrifty, not (thrifty or brief)
        self.capabilities = Capabilities("cpu" if provider == "cpu" else "gpu")

    def __enter__(self) -> Self:
        """Creates the session and makes sure that it runs where it was asked to.

        That it is complete on a GPU, and that the option counts shape nodes, too, is what ONNX
        Runtime's source says; real sessions were those of the CPU.
        """
        self._ort = check_provider(self._short_name)
        if not self.model.is_file():
            raise BackendError(f"The ONNX file {self.model} does not exist.", code="file-missing")
        session = self._new_session()
        running = session.get_providers()[0]
        if running != self.provider:
            raise BackendError(
                f"{self.provider} was asked for, but {running} would run {self.model}.",
                "Check the driver and the CUDA libraries; depthcut doesn't fall back.",
                code="provider-missing",
            )
        if self.provider == CPU:
            self._session = session
            self.capabilities = self._on_cpu()
        else:
            version = self._ort.__version__
            refuse_nodes_on_cpu(session, self.provider, self.model, version)
            self._session = session
        return self

    def _on_cpu(self) -> Capabilities:
        return replace(
            self.capabilities,
            widened=self._copy is not None,
            huge_page_bytes=move_to_huge_pages() if self._moves else 0,
            prefill_chunk_tokens=(
                chunk_tokens(self.inputs, self.cache_form) if self.last_logits else 0
            ),
        )

    def __exit__(self, *exc_info: object) -> None:
        """Frees the session."""
        self._session = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, in the graph's order, with the cache's sizes where known."""
        return tuple(self._sized(self._spec(value)) for value in self._loaded().get_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in the graph's order."""
        return tuple(self._spec(value) for value in self._loaded().get_outputs())

    @cached_property
    def cache_form(self) -> CacheForm:
        """What the graph tells about its caches; the model need not be loaded."""
        return read_cache_form(self.model)

    @property
    def last_logits(self) -> dict[str, Array]:
        """What to give besides the inputs for the last position's logits alone.

        Empty where the graph has no such choice. Without it there are logits of all positions.
        """
        optional = {value.name for value in self._loaded().get_overridable_initializers()}
        return {KEEP: np.ones(1, np.int64)} if KEEP in optional else {}

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        phase: Phase | None = None,
    ) -> dict[str, Array]:
        """Runs once and returns the named outputs, or all of them, as arrays on the host.

        Rows may be padded wherever the mask says so, whatever the graph's attention takes.
        Caches may be as long as what is in them, also where the graph fixes their length, or an
        attention keeps a window in them and wants room for that.
        """
        names = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
        caches = self._packed_caches(inputs)
        if caches is None:
            return self._run(inputs, names)
        return run_packed(self._run, inputs, names, caches)

    def _packed_caches(self, inputs: Mapping[str, Array]) -> Mapping[str, str] | None:
        """By past, the present, where the graph's attention would misread a call; else None."""
        if not needs_packing(inputs) or not self.cache_form.sums_mask:
            return None
        form = self.cache_form
        if form.windows or set(form.shared) != {s.name for s in self.inputs if may_be_cache(s)}:
            raise BackendError(
                f"{self.model} takes no padding, nor rows with several new tokens after a cache: "
                "an attention keeps only a window, or something else reads its cache.",
                "Run rows of equal length.",
                code="no-padding",
            )
        return form.shared

    def _run(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        roomy = self.with_room(inputs)
        session, bound = self._loaded(), self._bound_inputs(roomy)
        for name in names:
            bound.binding.bind_output(name, "cpu")
        with self._run_errors():
            session.run_with_iobinding(bound.binding)
            arrays = [host_array(value) for value in bound.binding.get_outputs()]
        result = dict(zip(names, arrays, strict=True))
        return self.cache_form.filled_part(result, inputs) if roomy is not inputs else result

    def with_room(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """A call's inputs with caches and mask as long as the graph fixes them, or wants them."""
        form = self.cache_form
        fixed = form.mask is not None and any(map(has_fixed_length, self.inputs))
        room = form.with_room(inputs) if fixed or form.windows else {}
        return {**inputs, **room} if room else inputs

    def value(self, array: Array) -> Any:
        """An array as a value where the model runs."""
        return self._device_value(array)

    def token_values(self, tokens: Mapping[str, Array]) -> dict[str, Any]:
        """The inputs besides caches as values, for the last position's logits where it can be."""
        given = {**tokens, **self.last_logits}
        if MASK in given:
            given[MASK] = self.cache_form.masked(given[MASK])
        return {name: self.value(array) for name, array in given.items()}

    def binding(self) -> Any:
        """A new binding of inputs and outputs to values, for :meth:`run_binding`."""
        return self._loaded().io_binding()

    def run_binding(self, binding: Any) -> None:
        """Runs on what is bound."""
        with self._run_errors():
            self._loaded().run_with_iobinding(binding)

    def continued(
        self, tokens: Mapping[str, Array], caches: Mapping[str, Any], outputs: Sequence[str],
        *, phase: Phase,
    ) -> list[Any]:  # fmt: skip
        """Runs on caches that are where the model runs, and leaves theirs there."""
        binding, given = self.binding(), {**self.token_values(tokens), **caches}
        for name, value in given.items():  # the binding only borrows their memory
            binding.bind_ortvalue_input(name, value)
        for number, name in enumerate(outputs):
            binding.bind_output(name, self.device if number else "cpu")
        self.run_binding(binding)
        logits, *presents = binding.get_outputs()
        return [host_array(logits), *presents]

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Binds the inputs on the device, and outputs that each call overwrites."""
        session, caches = self._loaded(), self._packed_caches(inputs)
        inputs = inputs if caches is None else packed(inputs, caches)
        roomy = self.cache_form.with_room(inputs) if any(map(may_be_cache, self.inputs)) else {}
        names = [spec.name for spec in self.outputs]
        pairs = self.cache_form.shared.items()
        shared = {present: past for past, present in pairs if past in roomy}
        # Only the CPU takes chunks; there a value lies over its array, so all share the caches.
        parts = in_chunks({**inputs, **roomy}, self.capabilities.prefill_chunk_tokens)
        bounds = [self._bound_inputs(part) for part in parts]
        with self._run_errors():
            for bound in bounds:
                for name, array in self.last_logits.items():
                    bound.add(name, self._device_value(array), array)
                bound.settle(session, names, shared, self.device)
        run = session.run_with_iobinding

        def call() -> None:
            try:  # without a failure this costs nothing, which _run_errors() would
                for bound in bounds:
                    run(bound.binding)
            except Exception as error:
                raise self._run_error(error) from error

        return BoundCall(call)

    def _new_session(self) -> Any:
        if self._copy is None:
            try:
                return self._open(self.model)
            except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
                narrow = self._short_name == "cpu" and lacks_a_kernel(str(error))
                if not (narrow and is_bfloat16(self.model)):
                    raise load_failure(self.model, error, self._ort.__version__) from error
            self._copy = WidenedCopy(self.model)
        try:
            return self._open(self._copy.file)
        except Exception as error:
            raise load_failure(self.model, error, self._ort.__version__) from error

    def _open(self, file: Path) -> Any:
        # CUDA leaves the arithmetic on shapes to the CPU, so that one is always there.
        providers = list(dict.fromkeys([self.provider, CPU]))
        return new_session(file, providers=providers, threads=self.threads, thrifty=self._thrifty)

    @property
    def session(self) -> Any:
        """The ``InferenceSession``, for other tools."""
        return self._loaded()

    @property
    def device(self) -> str:
        """Where values lie, as ONNX Runtime calls it."""
        return self._short_name

    def _loaded(self) -> Any:
        if self._session is None:
            raise self.not_entered()
        return self._session

    def _bound_inputs(self, inputs: Mapping[str, Array]) -> BoundInputs:
        session = self._loaded()
        self.refuse_missing(inputs)
        bound = BoundInputs(session.io_binding(), {}, [])
        for spec in self.inputs:
            array = np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype)
            bound.add(spec.name, self._device_value(array), array)
        return bound

    def _device_value(self, array: Array) -> Any:
        return device_value(self._ort.OrtValue, array, self.device)

    def _sized(self, spec: TensorSpec) -> TensorSpec:
        return spec if sizes_are_told(spec) else self.cache_form.sized(spec)

    def _spec(self, value: Any) -> TensorSpec:
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        dtype = numpy_dtype(kind, f"{self.model}: {value.name}")
        return TensorSpec(value.name, dtype, tuple(value.shape or ()))

    @contextmanager
    def _run_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._run_error(error) from error

    def _run_error(self, error: Exception) -> BackendError:
        return BackendError(
            f"ONNX Runtime failed while it ran {self.model}: {first_sentence(str(error))}",
            code="run-failed",
        )
