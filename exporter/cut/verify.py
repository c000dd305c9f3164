"""Holds a pruned graph against the masked oracle: the original with its branches times zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.artifacts import Verification
from exporter.cut.random_inputs import cases, draw, half_written
from exporter.engines.runners.sessions import (
    has_bfloat16,
    in_float32,
    loaded,
    narrowed_arrays,
    new_session,
    widened_arrays,
)
from exporter.errors import TooLittleMemoryError, VerificationError
from exporter.optional import require
from exporter.processes import available_bytes
from exporter.progress import Progress, Task
from graph_passes import testing
from graph_passes.files.storage import runtime_form
from graph_passes.types import Deletion, PassReport, SublayerRef

if TYPE_CHECKING:
    from graph_passes.replacements import ReplacementTensors

AnyArrays = Mapping[str, NDArray[Any]]

_RELATIVE = {"float16": 1e-2, "bfloat16": 5e-2}
_RELATIVE_FP32 = 1e-4
_OF_THE_EFFECT = 1e-2
# What rounding alone may come to where two graphs are fused differently: 32 units in the last
# place of fp32. In half precision it comes near the tolerance, which then decides alone.
_ROUNDING_FP32 = 32 * float(np.finfo(np.float32).eps)
_FILLER = 1e6  # larger values stand for "never": suppressed tokens, masks
_LEAVE_OUT = "--verify none leaves this check out; the report will say so."


@dataclass(frozen=True)
class MaskedDifference:
    """One output of one run."""

    case: str
    output: str
    max_abs_error: float
    allowed: float
    tolerance: float  # what it may be at most, however much masking changes
    effect: float
    rounding: float


def compare_run(
    case: str, plain: AnyArrays, masked: AnyArrays, pruned: AnyArrays
) -> list[MaskedDifference]:
    """Compares every output of one run."""
    if set(masked) != set(pruned):
        raise VerificationError(
            f"The pruned graph has other outputs than the masked original: "
            f"{sorted(set(masked) ^ set(pruned))}.",
            code="other-outputs",
        )
    for name, array in masked.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind in "OSUc":
            raise VerificationError(
                f"The output {name!r} is no tensor of numbers, so it can't be compared.",
                _LEAVE_OUT,
                code="not-numbers",
            )
    first = next(iter(masked))
    if not np.isfinite(masked[first].astype(np.float64)).any():
        raise VerificationError(
            f"The masked original gives no finite {first!r} for random inputs ({case}).",
            _LEAVE_OUT,
        )
    return [_compare(case, name, plain[name], masked[name], pruned[name]) for name in masked]


def _compare(
    case: str,
    name: str,
    plain: NDArray[Any],
    masked: NDArray[Any],
    pruned: NDArray[Any],
) -> MaskedDifference:
    relative = _RELATIVE.get(masked.dtype.name, _RELATIVE_FP32)  # before all becomes float64
    plain, masked, pruned = (array.astype(np.float64) for array in (plain, masked, pruned))
    values = np.abs(masked[np.isfinite(masked)])
    scale = max(1.0, float(values[values <= _FILLER].max(initial=0.0)))
    if masked.shape == pruned.shape and (np.isnan(masked) & np.isfinite(pruned)).any():
        raise VerificationError(
            f"The masked original gives NaN in {name!r} for random inputs ({case}): "
            "a branch overflows there, and infinity times zero is NaN.",
            _LEAVE_OUT,
        )
    tolerance = relative * scale
    rounding = tolerance if relative > _RELATIVE_FP32 else _ROUNDING_FP32 * scale
    effect = _effect(plain, masked)
    allowed = min(tolerance, max(rounding, _OF_THE_EFFECT * effect))
    error = _max_abs_error(masked, pruned, relative)
    return MaskedDifference(case, name, error, allowed, tolerance, effect, rounding)


def _max_abs_error(expected: NDArray[Any], actual: NDArray[Any], relative: float) -> float:
    """The largest difference; infinite where shapes, or values that aren't finite, differ."""
    if expected.shape != actual.shape:
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return float("inf")
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return float("inf")
    expected, actual = expected[finite], actual[finite]
    difference = np.abs(expected - actual)
    # A filler is so large that its own rounding would drown all else.
    filler = np.abs(expected) > _FILLER
    difference[filler & (difference <= relative * np.abs(expected))] = 0.0
    return float(difference.max(initial=0.0))


def _effect(plain: NDArray[Any], masked: NDArray[Any]) -> float:
    if plain.shape != masked.shape:
        return float("inf")
    result = (np.abs(plain) <= _FILLER) & (np.abs(masked) <= _FILLER)  # neither NaN nor infinite
    return float(np.abs(plain[result] - masked[result]).max(initial=0.0))


def judge(
    found: Sequence[MaskedDifference],
    cheaper_since: str = "",
    *,
    cut_anything: bool,
    widened: bool = False,
) -> Verification:
    """Sums up all outputs of all runs.

    ``passed`` is None where masking changes no output by more than rounding does: then a wrong
    cut would have looked the same.
    """
    worst = max(found, key=lambda item: item.max_abs_error / item.allowed)
    if worst.max_abs_error > worst.allowed:
        raise VerificationError(
            f"The pruned graph differs from the masked original: {worst.output!r} by "
            f"{worst.max_abs_error:.2e} in {worst.case}, more than {worst.allowed:.2e} "
            f"(masking changes it by {worst.effect:.2e}). Nothing was written.",
            "This is a bug in depthcut; please report it with the graph. " + _LEAVE_OUT,
            code="wrong-results",
        )
    tells = not cut_anything or any(item.effect > item.rounding for item in found)
    runs = list(dict.fromkeys(item.case for item in found))
    method = "masked oracle, ONNX Runtime CPU: " + ", ".join(runs)
    if widened:
        method += "; bfloat16 as float32"
    if cheaper_since:
        method += f"; cheaper setting ({cheaper_since}): not optimised, weights mapped"
    return Verification(
        method=method if tells else f"{method}; masking has no measurable effect",
        runs=len(runs),
        max_abs_error=worst.max_abs_error,
        tolerance=worst.allowed,
        passed=True if tells else None,
    )


_ELSEWHERE = "given.in.memory"


def set_apart(model: ir.Model, runtime: Any) -> dict[str, Any]:
    """Takes tensors that are read when asked for out of a model, which then declares them external.

    Inside, they could make it larger than the 2 GB that a message may have.
    """
    values = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.LazyTensor):
            values[name] = _runtime_value(tensor, runtime)
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                _ELSEWHERE, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
            )
    return values


def _runtime_value(tensor: ir.TensorProtocol, runtime: Any) -> Any:
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.BFLOAT16:  # numpy has none, so its bits go
        make = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
        return make(array.view(np.uint16), tensor.dtype.value)
    whole = np.ascontiguousarray(array).reshape(array.shape)  # it gives a scalar an axis
    return runtime.OrtValue.ortvalue_from_numpy(whole)


def relocated(graph_file: Path, weights_folder: Path) -> bytes:
    """A staged graph's bytes, with data files beside it named as seen from another folder.

    A session reads from one folder only, so the new weights of a graph that shares the others are
    named by their way from there.
    """
    if graph_file.parent == weights_folder:
        return graph_file.read_bytes()
    proto = onnx.load_model(graph_file, load_external_data=False)
    own = {path.name for path in graph_file.parent.iterdir() if path != graph_file}
    for tensor in proto.graph.initializer:
        _relocate(tensor, own, graph_file.parent, weights_folder)
    data: bytes = proto.SerializeToString()
    return data


def _relocate(tensor: onnx.TensorProto, own: set[str], folder: Path, seen_from: Path) -> None:
    for entry in tensor.external_data:
        if entry.key == "location" and entry.value in own:
            way = folder.resolve().relative_to(seen_from.resolve())
            entry.value = (way / entry.value).as_posix()


_SPARE = 1.2  # a session was seen to take 1.02 to 1.06 times its weights in fp32
_OWN_BYTES = 256 << 20  # ONNX Runtime, the graph, activations
_INLINE_COPIES = 3  # weights inside the ONNX file: ours, the serialised ones, the runtime's
_FP32_BYTES = 4


def thrifty_because(model: ir.Model, limit_bytes: int) -> str:
    """Why a model is verified at the cheaper of two settings; empty where it is not.

    At the full setting a session holds all weights in memory, in fp32 even where the file has fp16.
    At the cheaper one it holds one at a time, so that the model may be larger than the memory; then
    each of the three runs reads the weights from disk once. Those in bfloat16 are held in fp32 at
    both, see :mod:`exporter.engines.runners.sessions`.
    """
    weights = list(_tensors(model))
    total = sum(tensor.nbytes for tensor in weights)
    free = available_bytes()
    if total > limit_bytes:
        reason = f"{_size(total)} of weights, more than the limit of {_size(limit_bytes)}"
    elif free is not None and (needed := _needed_in_full(weights)) > free:
        reason = f"the full check would take {_size(needed)} of memory, {_size(free)} are free"
    else:
        return ""
    needed = _needed_by_the_thrifty(weights)
    if free is not None and needed > free:
        raise TooLittleMemoryError(
            f"The result can't be verified here: ONNX Runtime would need about {_size(needed)} of "
            f"memory, and {_size(free)} are free. Nothing was written.",
            "Free some memory, use a larger machine, or leave the check out with --verify none; "
            "the report will say so.",
        )
    return reason


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _needed_in_full(weights: list[ir.TensorProtocol]) -> int:
    return _OWN_BYTES + int(_SPARE * sum(map(_in_fp32, weights))) + _held(weights)


def _needed_by_the_thrifty(weights: list[ir.TensorProtocol]) -> int:
    """What is inside the ONNX file, and twice the largest weight that has to become fp32."""
    inline = sum(w.nbytes for w in weights if not isinstance(w, ir.ExternalTensor))
    widened = max((_in_fp32(w) for w in weights if _in_fp32(w) > w.nbytes), default=0)
    return _OWN_BYTES + _INLINE_COPIES * inline + 2 * widened + _held(weights)


def _held(weights: list[ir.TensorProtocol]) -> int:
    """What is handed to ONNX Runtime in another type than the file's, beside its own copies."""
    return sum(_in_fp32(w) for w in weights if w.dtype == ir.DataType.BFLOAT16)


def _in_fp32(tensor: ir.TensorProtocol) -> int:
    """The bytes of a weight where there is no kernel for its own floating-point type."""
    if tensor.dtype.is_floating_point():
        return max(tensor.nbytes, _FP32_BYTES * int(tensor.size))
    return int(tensor.nbytes)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 10**9 else f"{count / 1e6:.3g} MB"


Arrays = dict[str, NDArray[Any]]

_ACCURACY, _IN_FLOAT32 = "accuracy_level", 1  # of MatMulNBits and its kin


@dataclass(frozen=True)
class UncutGraph:
    """A graph before the cut, and what the oracle makes of it."""

    model: ir.Model
    weights_folder: Path
    deletions: Sequence[Deletion]
    replacements: Mapping[SublayerRef, ReplacementTensors]


@dataclass(frozen=True)
class PrunedFile:
    """A pruned graph's file, the folder that its weights lie in, and how it was made."""

    file: Path
    weights_folder: Path
    made: PassReport


def verify_candidate(
    original: UncutGraph, pruned: PrunedFile, progress: Progress, thrifty_because: str = ""
) -> Verification:
    """Runs both on ONNX Runtime's CPU provider, with random inputs of the graph's own shapes.

    A decoder with a cache is run in prefill (empty cache) and in decode (one token), anything
    else once; batches are padded on the left where there is a mask. All outputs that are left
    are compared, the caches included. The plain original is run too: the error must be small
    against what masking changes, or a wrong cut of a weak branch would pass.
    """
    thrifty = bool(thrifty_because)
    if thrifty:
        progress.say(f"verifying at a cheaper setting: {thrifty_because}")
    rng, model = np.random.default_rng(0), original.model
    inputs = [(case, draw(model, case, rng)) for case in cases(model, one=thrifty)]
    widened = has_bfloat16(model)
    with progress.task("verify against the masked original", 3 * len(inputs), "runs") as task:
        # A value that is fused away is not rounded, and in int8 each rounding shows.
        optimise = not any(node.op_type == "QuantizeLinear" for node in model.graph)
        runtime = _Runtime(optimise=optimise, thrifty=thrifty, widen=widened, task=task)
        runs = _run_all(original, pruned, [feed for _, feed in inputs], runtime)
    cut_anything = bool(pruned.made.deleted)
    differences = [
        difference
        for (case, _), *arrays in zip(inputs, *runs, strict=True)
        for difference in compare_run(case.name, *arrays)
    ]
    verification = judge(differences, thrifty_because, cut_anything=cut_anything, widened=widened)
    if verification.passed is None:
        progress.say("the deleted branches have no measurable effect, so the check proves little")
    return verification


def _run_all(
    original: UncutGraph, pruned: PrunedFile, feeds: Sequence[Arrays], runtime: _Runtime
) -> tuple[list[Arrays], list[Arrays], list[Arrays]]:
    """What the original, the masked original and the pruned graph give, by the latter's names."""
    plain = runtime.outputs_of(original.model, original.weights_folder, feeds)
    masked_graph = testing.masked_model(original.model, original.deletions, original.replacements)
    masked = runtime.outputs_of(masked_graph, original.weights_folder, feeds)
    names = _Names(pruned.made, half_written(original.model))
    feeds = [names.inputs(feed) for feed in feeds]
    cut = runtime.outputs_of_file(pruned.file, pruned.weights_folder, feeds)
    if has_bfloat16(original.model) and original.replacements:
        # They are rounded in the graph, and not in the oracle.
        plain, masked, cut = (list(map(narrowed_arrays, runs)) for runs in (plain, masked, cut))
    return (
        list(map(names.outputs, plain)),
        list(map(names.outputs, masked)),
        list(map(names.settled, cut)),
    )


class _Names:
    """What the pruned graph calls the original's inputs and outputs, and which it lacks."""

    def __init__(self, made: PassReport, half_written: set[str]) -> None:
        self._gone_inputs = {name for entry in made.deleted for name in entry.inputs_removed}
        self._gone_outputs = {name for entry in made.deleted for name in entry.outputs_removed}
        self._renamed = made.kv_renumbering
        self._blank = {self._renamed.get(name, name) for name in half_written}

    def inputs(self, feed: Mapping[str, Any]) -> Arrays:
        return self._translated(feed, self._gone_inputs)

    def outputs(self, arrays: Mapping[str, Any]) -> Arrays:
        return self.settled(self._translated(arrays, self._gone_outputs))

    def settled(self, arrays: Mapping[str, Any]) -> Arrays:
        """The pruned graph's outputs, with nothing in those that are half-written."""
        return {k: np.zeros_like(v) if k in self._blank else v for k, v in arrays.items()}

    def _translated(self, arrays: Mapping[str, Any], gone: set[str]) -> Arrays:
        return {self._renamed.get(k, k): v for k, v in arrays.items() if k not in gone}


class _Runtime:
    """Runs models on ONNX Runtime, one after the other; only one is in memory at a time."""

    def __init__(self, *, optimise: bool, thrifty: bool, widen: bool, task: Task) -> None:
        self._module = require("onnxruntime", extra="cpu")
        self._widen = widen
        self._optimise = optimise
        self._thrifty = thrifty
        self._task = task

    def outputs_of(self, model: ir.Model, folder: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
        """Every feed's outputs; the model's lazy tensors may have become others afterwards."""
        if self._widen:
            model, feeds = in_float32(model), list(map(widened_arrays, feeds))
        given = set_apart(model, self._module)
        return self._outputs(*runtime_form(model, folder), feeds, given)

    def outputs_of_file(self, file: Path, folder: Path, feeds: Sequence[Arrays]) -> list[Arrays]:
        """The same of a graph's file as it is, unless it has to be widened."""
        graph = relocated(file, folder)
        if self._widen:
            return self.outputs_of(loaded(graph, folder), folder, feeds)
        return self._outputs(graph, folder, feeds)

    def _outputs(
        self,
        model: bytes,
        folder: Path,
        feeds: Sequence[Arrays],
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Arrays]:
        """Every feed's outputs; ``given`` holds weights that lie in no file."""
        results = []
        try:
            session = new_session(
                with_exact_products(model),
                optimise=self._optimise,
                thrifty=self._thrifty,
                weights_folder=folder,
                weights=given,
            )
            names = [value.name for value in session.get_outputs()]
            for feed in feeds:
                results.append(dict(zip(names, session.run(names, feed), strict=True)))
                self._task.advance()
        except Exception as error:  # each of ONNX Runtime's own classes derives from Exception
            reason = str(error).strip().splitlines()[0][:300]
            raise VerificationError(
                f"The result can't be verified: ONNX Runtime says {reason}",
                _LEAVE_OUT,
            ) from error
        return results


def with_exact_products(graph: bytes) -> bytes:
    """A serialised graph whose products with packed weights are computed in float32.

    At their usual level of accuracy they quantise their input to int8, so that a difference in
    the last place, as fused sums make it, comes out as a whole step of the quantiser.
    """
    if _ACCURACY.encode() not in graph:
        return graph
    proto = onnx.ModelProto.FromString(graph)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == _ACCURACY and attribute.i:
                attribute.i = _IN_FLOAT32
    data: bytes = proto.SerializeToString()
    return data
