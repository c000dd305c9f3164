"""Optimisation profiles: for each input the smallest, the usual and the largest shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from exporter import options
from exporter.engines.build.settings import Phase, Profile, ShapeRange
from exporter.engines.tensors import TensorSpec
from exporter.errors import EngineError, UsageError
from exporter.files import sha256_file, sha256_files
from exporter.option_types import Written, parsed
from graph_passes.files.storage import data_files, load_model
from graph_passes.plan_record import recorded_replacements
from graph_passes.types import number_in

if TYPE_CHECKING:
    import onnx_ir as ir

SHAPES = "Shapes that the engine serves"
Dim = int | str | None

_CACHE_AXES, _PAST_AXIS = 4, 2
Axis = Literal["batch", "sequence", "past", "total"]
_TOKENS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "token_type_ids", "decoder_input_ids"}
)


@dataclass(frozen=True)
class Span:
    """The sizes that an axis may have: smallest, usual (tuned for), largest."""

    low: int
    usual: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.usual <= self.high:
            raise UsageError(
                f"The range {self} does not go up from 0.", "Write it as MIN:USUAL:MAX."
            )

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.usual + other.usual, self.high + other.high)

    def __str__(self) -> str:
        return f"{self.low}:{self.usual}:{self.high}"

    @classmethod
    def parse(cls, text: str) -> Span:
        """Reads ``MIN:USUAL:MAX``, or one number for all three."""
        try:
            numbers = [int(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers *= 3
        if len(numbers) != 3:
            raise UsageError(
                f"{text!r} is not a range.", "Write it as MIN:USUAL:MAX, or one number."
            )
        return cls(*numbers)


def _from_one(span: Span) -> Span:
    if span.low < 1:
        raise ValueError(f"the range {span} begins below 1")
    return span


_Range = Annotated[Span, parsed(Span.parse), Written("RANGE")]
_FromOne = Annotated[_Range, AfterValidator(_from_one)]


@options.dataclass(frozen=True)
class Ranges(options.Options):
    """How large what an engine serves may be; None stands for the usual range."""

    section = SHAPES
    batch: _FromOne | None = options.option(
        None, "Sequences: MIN:USUAL:MAX, or one number.", "--batch-range", usual="1"
    )
    prompt: _FromOne | None = options.option(
        None, "Tokens in a prefill or encoder.", "--prompt-range", usual="1:512:2048"
    )
    context: _Range | None = options.option(
        None, "Filled cache in decode.", "--context-range", usual="1:512:4096"
    )


def graph_inputs(path: Path) -> list[TensorSpec]:
    """The inputs that an ONNX file declares. Sizes that are digits in a name are numbers."""
    return input_tensors(path, load_model(path))


def input_tensors(path: Path, model: ir.Model) -> list[TensorSpec]:
    """The same of a model that was read from ``path``."""
    values = [value for value in model.graph.inputs if not value.is_initializer()]
    return [_tensor(path, value) for value in values]


def graph_outputs(path: Path) -> list[TensorSpec]:
    """The outputs that an ONNX file declares; see :func:`graph_inputs`."""
    return [_tensor(path, value) for value in load_model(path).graph.outputs]


def _tensor(path: Path, value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise EngineError(f"{path}: {value.name!r} declares no shape or no type.")
    dims = (dim if isinstance(dim, int) else dim.value for dim in value.shape)
    shape = tuple(_number(dim) for dim in dims)
    return TensorSpec(value.name or "", value.dtype.numpy(), shape)


def _number(dim: Dim) -> Dim:
    """Some exporters write numbers as names, which TensorRT would take for free sizes."""
    number = number_in(dim) if isinstance(dim, str) else None
    return dim if number is None else number


def _is_cache(given: TensorSpec) -> bool:
    """Whether it holds keys or values of earlier tokens."""
    return len(given.shape) == _CACHE_AXES and "past" in given.name


def phases_of(inputs: Sequence[TensorSpec]) -> tuple[Phase, ...]:
    """What a graph can do: prefill and decode with a cache, else encode."""
    return (
        ("prefill", "decode")
        if any(_is_cache(tensor_spec) for tensor_spec in inputs)
        else ("encode",)
    )


def has_fixed_caches(inputs: Sequence[TensorSpec]) -> bool:
    """Whether caches have lengths that the graph fixes, as those have that are updated in place."""
    return any(
        _is_cache(tensor_spec) and isinstance(tensor_spec.shape[_PAST_AXIS], int)
        for tensor_spec in inputs
    )


def refuse_unknown_axes(inputs: Sequence[TensorSpec], ranges: Ranges) -> None:
    """Keeps a range from being passed over."""
    for name in _unused(inputs, ranges):
        raise UsageError(
            f"No input has an axis that --{name}-range could be for.",
            "Leave it out.",
            code="unknown-axis",
        )


def fitting(inputs: Sequence[TensorSpec], ranges: Ranges) -> Ranges:
    """The ranges without those that no input has an axis for, such as an encoder's context."""
    unused = _unused(inputs, ranges)
    return Ranges(
        batch=None if "batch" in unused else ranges.batch,
        prompt=None if "prompt" in unused else ranges.prompt,
        context=None if "context" in unused else ranges.context,
    )


def _unused(inputs: Sequence[TensorSpec], ranges: Ranges) -> list[str]:
    """By name, the ranges that are given and that no input has an axis for."""
    axes = {
        _meaning(tensor_spec, axis)
        for tensor_spec in inputs
        for axis in range(len(tensor_spec.shape))
    }
    serve: dict[str, set[Axis]] = {
        "batch": {"batch"}, "prompt": {"sequence", "total"}, "context": {"past"},
    }  # fmt: skip
    return [
        name
        for name, meanings in serve.items()
        if getattr(ranges, name) is not None and not axes & meanings
    ]


def profile(inputs: Sequence[TensorSpec], phase: str, ranges: Ranges) -> Profile:
    """The profile of one phase.

    A prefill begins with an empty cache, a decode step takes one token.
    """
    known = next((item for item in phases_of(inputs) if item == phase), None)
    if known is None:
        has = " and ".join(phases_of(inputs))
        raise UsageError(
            f"This graph has no phase {phase!r}: it has {has}.", code="no-profile-fits"
        )
    sequence = Span(1, 1, 1) if phase == "decode" else ranges.prompt or Span(1, 512, 2048)
    past = (ranges.context or Span(1, 512, 4096)) if phase == "decode" else Span(0, 0, 0)
    spans: dict[Axis, Span] = {
        "batch": ranges.batch or Span(1, 1, 1),
        "sequence": sequence,
        "past": past,
        "total": past + sequence,
    }
    return Profile(
        phase=known,
        shapes={tensor_spec.name: _shape(tensor_spec, spans) for tensor_spec in inputs},
    )


def _shape(given: TensorSpec, spans: Mapping[Axis, Span]) -> ShapeRange:
    sizes = [_axis(given, axis, spans) for axis in range(len(given.shape))]
    return ShapeRange(
        low=tuple(size.low for size in sizes),
        usual=tuple(size.usual for size in sizes),
        high=tuple(size.high for size in sizes),
    )


def _axis(given: TensorSpec, axis: int, spans: Mapping[Axis, Span]) -> Span:
    size = given.shape[axis]
    if isinstance(size, int):
        return Span(size, size, size)
    if (meaning := _meaning(given, axis)) is not None:
        return spans[meaning]
    name = size or f"axis {axis}"
    raise UsageError(
        f"The size {name!r} of the input {given.name!r} is free, and nothing says how large it is.",
        "Fix it in the graph, or build with trtexec.",
        code="unknown-axis",
    )


def _meaning(given: TensorSpec, axis: int) -> Axis | None:
    """What a free axis counts, as far as the input's name and the axis's place tell."""
    if isinstance(given.shape[axis], int):
        return None
    if axis == 0:
        return "batch"
    if _is_cache(given) and axis == _PAST_AXIS:
        return "past"
    if axis == 1 and given.name in _TOKENS:
        return "total" if given.name == "attention_mask" else "sequence"
    return None


_FLOATS = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclass(frozen=True)
class EngineSource:
    """A graph that an engine is built from."""

    precision: str
    plan: list[dict[str, Any]]
    inputs: tuple[TensorSpec, ...]
    weights: tuple[Path, ...]


def read_source(path: Path) -> EngineSource:
    """Reads a graph without its weights."""
    model = load_model(path)
    plan: list[dict[str, Any]] = [
        {"kind": ref.kind, "layer": ref.layer, "replacement": replacement.kind}
        for ref, replacement in sorted(recorded_replacements(model).items())
    ]
    return EngineSource(
        precision=_precision(model),
        plan=plan,
        inputs=tuple(input_tensors(path, model)),
        weights=tuple(data_files(model)),
    )


def graph_hashes(path: Path, source: EngineSource) -> dict[str, str]:
    """What an engine's record says that it was made from: the graph's file, and its weights'."""
    hashes = {"model": sha256_file(path)}
    if source.weights:
        hashes["weights"] = sha256_files(source.weights, path.parent)
    return hashes


def _precision(model: Any) -> str:
    sizes: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            sizes[value.const_value.dtype.name] += value.const_value.size
    floats = {_FLOATS[name]: size for name, size in sizes.items() if name in _FLOATS}
    main = max(floats, key=floats.__getitem__, default="fp32")
    quantised = [name for name in ("INT4", "UINT4", "INT8", "UINT8", "FLOAT8E4M3FN") if sizes[name]]
    most = max(quantised, key=sizes.__getitem__, default="")
    if not most or sizes[most] * 2 < sum(floats.values()):
        return main
    return f"{main}-{'fp8' if most.startswith('FLOAT8') else most.lower().lstrip('u')}"
