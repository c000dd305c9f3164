"""An engine's answers against ONNX Runtime's, phase by phase, and where they begin to differ."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.artifacts.latency import Shape
from exporter.engines.build.engine_set import EngineSet, find_builds, names_engines
from exporter.engines.build.graph import graph_hashes, read_source
from exporter.engines.build.profiles import phases_of
from exporter.engines.build.settings import Profile
from exporter.engines.explain.arms import Arm, EngineArm, OnnxArm
from exporter.engines.explain.narrowing import FirstDifference, Narrowing
from exporter.engines.explain.polygraphy_runs import Difference, Results, differences, save_inputs
from exporter.engines.inputs import make_inputs, random_tokens
from exporter.engines.runners.base import Array
from exporter.engines.runners.cache_form import has_fixed_length
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import TOLERANCE, TensorSpec
from exporter.errors import EngineError
from exporter.files import scratch_folder, staged_directory
from exporter.models.graph_facts import CACHE_INPUT, read_facts
from exporter.progress import QUIET, Progress

_TOKENS, _PAST = 8, 8


@dataclass(frozen=True)
class PhaseResult:
    """One phase.

    Attributes:
        phase: Such as ``decode``.
        outputs: Of the graph.
        first: The first tensor that differs; None where all outputs agree.
    """

    phase: str
    outputs: tuple[Difference, ...]
    first: FirstDifference | None = None

    @property
    def worst(self) -> Difference:
        """The output that is furthest off, by its tolerance."""
        return max(self.outputs, key=lambda each: each.max_abs_error / each.tolerance)


def verify_engine(
    engine: Path,
    onnx: Path,
    folder: Path | None = None,
    *,
    tolerance: float | None = None,
    threads: int,
    progress: Progress = QUIET,
) -> list[PhaseResult]:
    """Holds an engine against ONNX Runtime on the ONNX file that it was built from.

    Both are run by Polygraphy's runners on the same inputs, at the usual size of each profile.

    Args:
        engine: The engine or a folder of engines; or another ONNX file.
        onnx: The ONNX file.
        folder: Where inputs and results are written in Polygraphy's format, and the smallest part
            that differs as an ONNX file.
        tolerance: As of :data:`~exporter.engines.tensors.TOLERANCE`; None for that of the graph's
            precision.
        threads: ONNX Runtime's, for one operator.
        progress: Hears what is run and built.

    Returns:
        A result for each phase, up to the first that differs.

    Raises:
        EngineError: The engine was not built from that file, or can't be run.
        BackendError: There is no driver or no GPU.
        MissingDependencyError: Polygraphy is not installed.
    """
    tolerance = tolerance or TOLERANCE.get(read_facts(onnx).precision, TOLERANCE["bf16"])
    with scratch_folder("verify") as work:
        reference = OnnxArm(onnx, work, threads)
        results = []
        for arm, shape in _arms(engine, reference, progress):
            results.append(_verified(reference, arm, shape, tolerance, work))
            if results[-1].first is not None:
                break
        if folder is not None:
            _publish(work, folder)
    return results


def _arms(engine: Path, reference: OnnxArm, progress: Progress) -> Iterator[tuple[Arm, Shape]]:
    """The suspect, once for each phase, with the shape to run it at."""
    if not names_engines(engine):
        other = OnnxArm(engine, reference.work, reference.threads)
        with OnnxRuntimeRunner(reference.onnx, threads=reference.threads) as runner:
            specs = runner.inputs
        for phase in phases_of(specs):
            new, past = (1, _PAST) if phase == "decode" else (_TOKENS, 0)
            yield other, Shape(phase, 1, new, past)
        return
    engines = find_builds(engine)[0]
    _refuse_other_source(engines, reference.onnx)
    for slot in engines.slots:
        yield EngineArm(engines, slot, reference, reference.work, progress), _shape(slot.profile)


def _refuse_other_source(engines: EngineSet, onnx: Path) -> None:
    if engines.records[0].made_from != graph_hashes(onnx, read_source(onnx)):
        raise EngineError(
            f"{engines.name} was not built from {onnx}: their hashes differ.",
            "Name the ONNX file that was given to depthcut build, or build the engine again.",
            code="not-built-from",
        )


def _shape(profile: Profile) -> Shape:
    """A profile's usual sizes; half of a cache in place is filled."""
    batch, new = profile.shapes["input_ids"].usual
    spans = (span for name, span in profile.shapes.items() if CACHE_INPUT.fullmatch(name))
    cache = next(spans, None) if profile.phase == "decode" else None
    if cache is None:
        return Shape(profile.phase, batch, new)
    in_place = cache.low[2] == cache.high[2]
    return Shape(profile.phase, batch, new, cache.usual[2] // (2 if in_place else 1))


def _verified(
    reference: OnnxArm, suspect: Arm, shape: Shape, tolerance: float, work: Path
) -> PhaseResult:
    feed = _inputs(reference, shape)
    save_inputs(feed, work / f"inputs-{shape.phase}.json")
    wanted, found = reference.run(feed), suspect.run(feed)
    for name, results in (("onnxruntime", wanted), ("engine", found)):
        _save(results, work / f"{name}-{shape.phase}.json")
    outputs = tuple(differences(wanted, found, tolerance))
    failed = next((each for each in outputs if not each.passed), None)
    if failed is None:
        return PhaseResult(shape.phase, outputs)
    narrowing = Narrowing(reference, suspect, feed, tolerance)
    first = narrowing.first(failed)
    narrowing.write(first, work)
    return PhaseResult(shape.phase, outputs, first)


def _inputs(reference: OnnxArm, shape: Shape) -> dict[str, Array]:
    with OnnxRuntimeRunner(reference.onnx, threads=reference.threads) as runner:
        specs: Sequence[TensorSpec] = runner.inputs
        vocabulary = read_facts(reference.onnx).vocabulary or 2
        given = make_inputs(specs, shape, random_tokens(shape, vocabulary))
        fixed = runner.cache_form.mask is not None and any(map(has_fixed_length, specs))
        return {**given, **(runner.cache_form.with_room(given) if fixed else {})}


def _save(results: Results, path: Path) -> None:
    results.save(str(path))


def _publish(work: Path, folder: Path) -> None:
    with staged_directory(folder) as stage:
        for file in sorted(each for each in work.iterdir() if each.is_file()):
            shutil.copyfile(file, stage / file.name)
