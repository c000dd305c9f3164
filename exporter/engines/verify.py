"""Holds an engine's answers against ONNX Runtime's, phase by phase."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.artifacts.latency import Shape
from exporter.engines.build.engine_set import find_builds, names_engines
from exporter.engines.build.profiles import graph_hashes, phases_of, read_source
from exporter.engines.build.settings import Profile
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.base import Array, Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.runners.tensorrt import TensorRtRunner
from exporter.engines.tensors import TOLERANCE
from exporter.errors import EngineError
from exporter.files import staged_directory
from exporter.models.graph_facts import CACHE_INPUT, read_facts

_TOKENS, _PAST = 8, 8


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from ONNX Runtime's; infinite without a number or of another shape."""

    tensor: str
    max_abs_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.max_abs_error <= self.tolerance


@dataclass(frozen=True)
class PhaseResult:
    """The outputs of one phase."""

    phase: str
    outputs: tuple[Difference, ...]

    @property
    def worst(self) -> Difference:
        """The output that is furthest off, by its tolerance."""
        return max(self.outputs, key=lambda each: each.max_abs_error / each.tolerance)

    @property
    def agrees(self) -> bool:
        """Whether all outputs are within their tolerances."""
        return all(each.passed for each in self.outputs)


def verify_engine(
    engine: Path,
    onnx: Path,
    folder: Path | None = None,
    *,
    tolerance: float | None = None,  # None for what the precision allows
    threads: int,
) -> list[PhaseResult]:
    """Holds an engine, or another ONNX file, against ONNX Runtime on an ONNX file.

    Both get the same inputs, at the usual size of each profile. Only one is loaded at a time.
    """
    facts, results = read_facts(onnx), []
    allowed = tolerance or TOLERANCE.get(facts.precision, TOLERANCE["bf16"])
    other, shapes = _opened(engine, onnx, threads)
    with OnnxRuntimeRunner(onnx, threads=threads) as runner:
        sizes = {"prefill": (_TOKENS, 0), "decode": (1, _PAST), "encode": (_TOKENS, 0)}
        shapes = shapes or [Shape(phase, 1, *sizes[phase]) for phase in phases_of(runner.inputs)]
        tokens = {shape: random_tokens(shape, facts.vocabulary or 2) for shape in shapes}
        feeds = {shape: make_inputs(runner.inputs, shape, tokens[shape]) for shape in shapes}
        wanted = {shape: runner.run(feeds[shape], phase=shape.phase) for shape in shapes}
    with other, contextlib.ExitStack() as stack:
        stage = None if folder is None else stack.enter_context(staged_directory(folder))
        for shape in shapes:
            got = other.run(feeds[shape], phase=shape.phase)
            results.append(PhaseResult(shape.phase, differences(wanted[shape], got, allowed)))
            if stage is not None:
                _save(stage, shape, inputs=feeds[shape], onnxruntime=wanted[shape], engine=got)
    return results


def _opened(engine: Path, onnx: Path, threads: int) -> tuple[Runner, list[Shape]]:
    """What runs an engine, and at which shapes; none are known of an ONNX file."""
    if not names_engines(engine):
        return OnnxRuntimeRunner(engine, threads=threads), []
    engines = find_builds(engine)[0]
    if engines.records[0].made_from != graph_hashes(onnx, read_source(onnx)):
        raise EngineError(
            f"{engines.name} was not built from {onnx}: their hashes differ.",
            "Name the ONNX file that was given to depthcut build, or build the engine again.",
            code="not-built-from",
        )
    return TensorRtRunner(engines), [_shape(slot.profile) for slot in engines.slots]


def _save(stage: Path, shape: Shape, **arrays: Mapping[str, Array]) -> None:
    """Writes what went in and what came out; NumPy's files know no bfloat16."""
    for name, values in arrays.items():
        wide = {n: a.astype("f4") if a.dtype == "bfloat16" else a for n, a in values.items()}
        np.savez(stage / f"{name}-{shape.phase}.npz", **wide)  # type: ignore[arg-type]


def _shape(profile: Profile) -> Shape:
    """A profile's usual sizes; half of a cache in place is filled."""
    batch, new = profile.shapes["input_ids"].usual
    spans = (span for name, span in profile.shapes.items() if CACHE_INPUT.fullmatch(name))
    cache = next(spans, None) if profile.phase == "decode" else None
    if cache is None:
        return Shape(profile.phase, batch, new)
    in_place = cache.low[2] == cache.high[2]
    return Shape(profile.phase, batch, new, cache.usual[2] // (2 if in_place else 1))


def differences(
    wanted: Mapping[str, Array], found: Mapping[str, Array], tolerance: float
) -> tuple[Difference, ...]:
    """Compares the outputs that both gave; of logits of the last position alone, that one."""
    told = []
    for name in (name for name in wanted if name in found and wanted[name].size):
        want, got = (each[name].astype(np.float64) for each in (wanted, found))
        if want.ndim == got.ndim > 1 and got.shape == (len(want), 1, *want.shape[2:]):
            want = want[:, -1:]
        bound = tolerance * max(1.0, float(np.nan_to_num(np.abs(want), posinf=0.0).max()))
        error = float(np.abs(want - got).max()) if want.shape == got.shape else np.inf
        told.append(Difference(name, error if np.isfinite(error) else np.inf, bound))
    return tuple(told)
