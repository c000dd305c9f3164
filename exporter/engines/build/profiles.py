"""Optimisation profiles: for each input the smallest, the usual and the largest shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

_CACHE_AXES, _PAST_AXIS = 4, 2
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
    return [_tensor(path, v) for v in load_model(path).graph.inputs if not v.is_initializer()]


def graph_outputs(path: Path) -> list[TensorSpec]:
    """The outputs that an ONNX file declares; see :func:`graph_inputs`."""
    return [_tensor(path, value) for value in load_model(path).graph.outputs]


def _tensor(path: Path, value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None:
        raise EngineError(f"{path}: {value.name!r} declares no shape or no type.")
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    # Some exporters write numbers as names, which TensorRT would take for free sizes.
    numbers = [number_in(dim) if isinstance(dim, str) else dim for dim in dims]
    shape = [dim if number is None else number for dim, number in zip(dims, numbers, strict=True)]
    return TensorSpec(value.name or "", value.dtype.numpy(), tuple(shape))


def _is_cache(given: TensorSpec) -> bool:
    """Whether it holds keys or values of earlier tokens."""
    return len(given.shape) == _CACHE_AXES and "past" in given.name


def phases_of(inputs: Sequence[TensorSpec]) -> tuple[Phase, ...]:
    """What a graph can do: prefill and decode with a cache, else encode."""
    return ("prefill", "decode") if any(map(_is_cache, inputs)) else ("encode",)


def has_fixed_caches(inputs: Sequence[TensorSpec]) -> bool:
    """Whether caches have lengths that the graph fixes, as those have that are updated in place."""
    return any(_is_cache(item) and isinstance(item.shape[_PAST_AXIS], int) for item in inputs)


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
    return replace(ranges, **dict.fromkeys(_unused(inputs, ranges)))


def _unused(inputs: Sequence[TensorSpec], ranges: Ranges) -> list[str]:
    """By name, the ranges that are given and that no input has an axis for."""
    axes = {_meaning(item, axis) for item in inputs for axis in range(len(item.shape))}
    serve = {"batch": {"batch"}, "prompt": {"sequence", "total", "source"}, "context": {"past"}}
    return [name for name, on in serve.items() if getattr(ranges, name) and not axes & on]


_PROMPT = Span(1, 512, 2048)


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
    sequence = Span(1, 1, 1) if phase == "decode" else ranges.prompt or _PROMPT
    past = (ranges.context or Span(1, 512, 4096)) if phase == "decode" else Span(0, 0, 0)
    spans = {"batch": ranges.batch or Span(1, 1, 1), "source": ranges.prompt or _PROMPT}
    spans |= {"sequence": sequence, "past": past, "total": past + sequence}
    shapes = {}
    for item in inputs:
        sizes = [_axis(item, axis, spans) for axis in range(len(item.shape))]
        ends = ([getattr(size, end) for size in sizes] for end in ("low", "usual", "high"))
        low, usual, high = map(tuple, ends)
        shapes[item.name] = ShapeRange(low=low, usual=usual, high=high)
    return Profile(phase=known, shapes=shapes)


def _axis(given: TensorSpec, axis: int, spans: Mapping[str, Span]) -> Span:
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


def _meaning(given: TensorSpec, axis: int) -> str | None:
    """What a free axis counts, as far as the input's name and the axis's place tell."""
    if isinstance(given.shape[axis], int):
        return None
    if axis == 0:
        return "batch"
    if axis == 1 and given.name.startswith("encoder_"):
        return "source"
    if _is_cache(given) and axis == _PAST_AXIS:
        return "source" if ".encoder." in given.name else "past"
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
    weights: tuple[Path, ...]  # the files that hold them beside the graph's


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
        inputs=tuple(_tensor(path, v) for v in model.graph.inputs if not v.is_initializer()),
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
