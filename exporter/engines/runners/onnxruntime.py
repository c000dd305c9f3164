"""ONNX Runtime, on the CPU or on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from exporter.artifacts.latency import Phase
from exporter.engines.runners.base import Array, BoundCall, Capabilities, Runner
from exporter.engines.runners.cache_form import (
    CacheForm,
    has_fixed_length,
    may_be_cache,
    read_cache_form,
    sizes_are_told,
)
from exporter.engines.runners.huge_pages import move_to_huge_pages
from exporter.engines.runners.left_padding import MASK, needs_packing, packed, run_packed
from exporter.engines.runners.ort_values import BoundInputs, device_value, host_array
from exporter.engines.runners.prefill_chunks import chunk_tokens, in_chunks
from exporter.engines.runners.sessions import (
    CPU,
    PROVIDERS,
    check_provider,
    first_sentence,
    lacks_a_kernel,
    load_failure,
    new_session,
    shape_nodes_on_cpu,
)
from exporter.engines.runners.widening import WidenedCopy, is_bfloat16
from exporter.engines.tensors import TensorSpec, numpy_dtype
from exporter.errors import BackendError
from graph_passes.fusing.logits_to_keep import KEEP


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
        """Notes what to load; nothing is read before ``__enter__``.

        Args:
            model: The ONNX file.
            provider: ``cpu`` or ``cuda``.
            threads: Threads for one operator; operators run one after the other.
            thrifty: Leaves weights in their file, mapped into memory, and runs the graph as it is
                written: slower, and no larger than a few weights.
            brief: For a few runs that aren't timed: memory isn't moved to huge pages, which takes a
                second or two for each gigabyte.

        Raises:
            BackendError: For a provider that this backend doesn't know.
        """
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

        On CUDA that goes node by node. The CPU's provider is always there, and ONNX Runtime gives
        it every node that has no kernel on the GPU, without a word; it also gives it the
        arithmetic on shapes, on purpose and for speed. So the session option
        ``session.disable_cpu_ep_fallback``, which refuses both, is of no use for a graph with
        dynamic dimensions. Instead the session's own record of who got which node is read: nodes
        that compute shapes are counted in the capabilities, any other is refused.

        That it is complete on a GPU, and that the option counts shape nodes, too, is what ONNX
        Runtime's source says; real sessions were those of the CPU.

        Raises:
            BackendError: When the file can't be loaded, the provider doesn't run, or a node that
                computes more than shapes would run on the CPU instead.
            MissingDependencyError: Without onnxruntime.
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
                code="provider-fallback",
            )
        if self.provider == CPU:
            self._session = session
            self.capabilities = self._on_cpu()
        else:
            version = self._ort.__version__
            nodes = shape_nodes_on_cpu(session, self.provider, self.model, version)
            self._session, self.capabilities = session, replace(self.capabilities, cpu_nodes=nodes)
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
        """The model's inputs, in the graph's order; a cache's sizes are told where they are known.

        Raises:
            OnnxFileError: A cache's size must be looked up in the graph, which is unsound.
        """
        return tuple(self._sized(self._spec(value)) for value in self._loaded().get_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in the graph's order."""
        return tuple(self._spec(value) for value in self._loaded().get_outputs())

    @cached_property
    def cache_form(self) -> CacheForm:
        """What the graph tells about its caches; the model need not be loaded.

        Raises:
            OnnxFileError: The file is no complete ONNX model.
        """
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

        Raises:
            BackendError: When the run fails, a cache has too little room, or the graph takes no
                padding at all.
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
        form = self.cache_form
        fixed = any(map(has_fixed_length, self.inputs)) and form.mask is not None
        roomy = form.with_room(inputs) if fixed or form.windows else {}
        session, bound = self._loaded(), self._bound_inputs({**inputs, **roomy})
        for name in names:
            bound.binding.bind_output(name, "cpu")
        with self._run_errors():
            session.run_with_iobinding(bound.binding)
            arrays = [host_array(value) for value in bound.binding.get_outputs()]
        found = dict(zip(names, arrays, strict=True))
        return form.filled_part(found, inputs) if roomy else found

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
        """Runs on what is bound.

        Raises:
            BackendError: When the run fails.
        """
        with self._run_errors():
            self._loaded().run_with_iobinding(binding)

    def run_bound(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], on_host: Collection[str] = ()
    ) -> list[Any]:
        """Runs on values that are where the model runs, and leaves the outputs there.

        Args:
            inputs: By name, such values.
            outputs: Which outputs.
            on_host: Those of them that come to the host.

        Raises:
            BackendError: When the run fails.
        """
        session = self._loaded()
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu" if name in on_host else self.device)
        with self._run_errors():
            session.run_with_iobinding(binding)
        return list(binding.get_outputs())

    def prepare(self, inputs: Mapping[str, Array], *, phase: Phase | None = None) -> BoundCall:
        """Binds the inputs on the device, and outputs that each call overwrites.

        A cache that may be past and present in one buffer is: each call then writes the same new
        keys and values behind the same old ones. Where the graph lets its caller choose, a call
        gives the logits of the last position alone, which is what a server asks for. A long prompt
        then runs in chunks, as it does in generation.

        Raises:
            BackendError: When the first run fails, or when a later call does.
        """
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
                told = str(error)
                narrow = self._short_name == "cpu" and lacks_a_kernel(told)
                if not (narrow and is_bfloat16(self.model)):
                    raise load_failure(self.model, told, self._ort.__version__) from error
            self._copy = WidenedCopy(self.model)
        try:
            return self._open(self._copy.file)
        except Exception as error:
            raise load_failure(self.model, str(error), self._ort.__version__) from error

    def _open(self, file: Path) -> Any:
        # CUDA leaves the arithmetic on shapes to the CPU, so that one is always there.
        providers = list(dict.fromkeys([self.provider, CPU]))
        return new_session(file, providers=providers, threads=self.threads, thrifty=self._thrifty)

    @property
    def session(self) -> Any:
        """The ``InferenceSession``, for other tools.

        Raises:
            BackendError: The runner is not entered.
        """
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
