"""Holds an engine's answers against ONNX Runtime's, phase by phase, by Polygraphy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifacts.latency import Shape
from exporter.engines.build.child import run_job
from exporter.engines.build.engine_set import EngineSet, Slot, find_builds, names_engines
from exporter.engines.build.polygraphy_run import polygraphy
from exporter.engines.build.profiles import graph_hashes, phases_of, read_source
from exporter.engines.build.settings import Profile
from exporter.engines.runners.base import Array
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import TOLERANCE, make_inputs, random_tokens
from exporter.errors import EngineError
from exporter.files import scratch_folder, staged_directory
from exporter.models.graph_facts import CACHE_INPUT, read_facts
from exporter.progress import QUIET, Progress

_TOKENS, _PAST = 8, 8
Feed = Mapping[str, Array]
Results = Any
"""Polygraphy's ``RunResults``: by runner, the outputs of each run."""


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
        return max(
            self.outputs, key=lambda difference: difference.max_abs_error / difference.tolerance
        )

    @property
    def agrees(self) -> bool:
        """Whether all outputs are within their tolerances."""
        return all(output.passed for output in self.outputs)


def verify_engine(
    engine: Path,
    onnx: Path,
    folder: Path | None = None,
    *,
    tolerance: float | None = None,  # None for what the precision allows
    threads: int,
    progress: Progress = QUIET,
) -> list[PhaseResult]:
    """Holds an engine against ONNX Runtime on the ONNX file that it was built from.

    Both are run by Polygraphy's runners on the same inputs, at the usual size of each profile.
    """
    allowed = tolerance or TOLERANCE.get(read_facts(onnx).precision, TOLERANCE["bf16"])
    with scratch_folder("verify") as work:
        results = [
            _compared(onnx, run, shape, allowed, threads, work)
            for run, shape in _runs(engine, onnx, threads, work, progress)
        ]
        if folder is not None:
            with staged_directory(folder) as stage:
                for file in sorted(work.iterdir()):
                    shutil.copyfile(file, stage / file.name)
    return results


Run = Callable[[Feed, Path], Results]


def _runs(
    engine: Path, onnx: Path, threads: int, work: Path, progress: Progress
) -> Iterator[tuple[Run, Shape]]:
    """How the engine runs, once for each phase, with the shape to run it at."""
    if not names_engines(engine):
        with OnnxRuntimeRunner(onnx, threads=threads) as runner:
            specs = runner.inputs
        for phase in phases_of(specs):
            new, past = (1, _PAST) if phase == "decode" else (_TOKENS, 0)
            yield lambda feed, _: run_onnx(engine, feed, threads), Shape(phase, 1, new, past)
        return
    engines = find_builds(engine)[0]
    if engines.records[0].made_from != graph_hashes(onnx, read_source(onnx)):
        raise EngineError(
            f"{engines.name} was not built from {onnx}: their hashes differ.",
            "Name the ONNX file that was given to depthcut build, or build the engine again.",
            code="not-built-from",
        )
    for slot in engines.slots:

        def run(_: Feed, inputs: Path, slot: Slot = slot) -> Results:
            return _run_engine(engines, slot, inputs, work / "results.json", progress)

        yield run, _shape(slot.profile)


def _run_engine(
    engines: EngineSet, slot: Slot, inputs: Path, results: Path, progress: Progress
) -> Results:
    """Runs a profile in a process of its own, which may crash."""
    request = {
        "job": "polygraphy", "engine": str(engines.paths[slot.engine].resolve()),
        "profile": slot.number, "inputs": str(inputs), "results": str(results),
    }  # fmt: skip
    with polygraphy():
        from polygraphy.comparator import RunResults

        run_job(engines.library, request, progress, "run with Polygraphy")
        content = RunResults.load(str(results))
        results.unlink()
        return content


def run_onnx(model: Path, feed: Feed, threads: int) -> Results:
    """Runs an ONNX file on ONNX Runtime's CPU by Polygraphy's runner."""
    with polygraphy(), OnnxRuntimeRunner(model, threads=threads) as own:
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.comparator import Comparator

        return Comparator.run([OnnxrtRunner(own.session, "onnxruntime")], data_loader=[dict(feed)])


def _compared(
    onnx: Path, run: Run, shape: Shape, tolerance: float, threads: int, work: Path
) -> PhaseResult:
    feed, inputs = _inputs(onnx, shape, threads), work / f"inputs-{shape.phase}.json"
    with polygraphy():
        from polygraphy.json import save_json

        save_json([dict(feed)], str(inputs))
    wanted, got = run_onnx(onnx, feed, threads), run(feed, inputs)
    for name, results in (("onnxruntime", wanted), ("engine", got)):
        results.save(str(work / f"{name}-{shape.phase}.json"))
    return PhaseResult(shape.phase, tuple(differences(wanted, got, tolerance)))


def _inputs(onnx: Path, shape: Shape, threads: int) -> Feed:
    with OnnxRuntimeRunner(onnx, threads=threads) as runner:
        vocabulary = read_facts(onnx).vocabulary or 2
        given = make_inputs(runner.inputs, shape, random_tokens(shape, vocabulary))
        return runner.with_room(given)


def _shape(profile: Profile) -> Shape:
    """A profile's usual sizes; half of a cache in place is filled."""
    batch, new = profile.shapes["input_ids"].usual
    spans = (span for name, span in profile.shapes.items() if CACHE_INPUT.fullmatch(name))
    cache = next(spans, None) if profile.phase == "decode" else None
    if cache is None:
        return Shape(profile.phase, batch, new)
    in_place = cache.low[2] == cache.high[2]
    return Shape(profile.phase, batch, new, cache.usual[2] // (2 if in_place else 1))


def differences(wanted: Results, found: Results, tolerance: float) -> list[Difference]:
    """Compares what two runners gave for one input, by Polygraphy's comparison."""
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    ((_, (want,)),), ((_, (got,)),) = wanted.items(), found.items()
    names = [name for name in want.keys() if name in got.keys() and want[name].size]  # noqa: SIM118
    _keep_last(want, got, names)
    bounds = {name: tolerance * max(1.0, _largest(want[name])) for name in names}
    judge = SimpleCompareFunc(atol={**bounds, "": tolerance}, rtol=0.0, check_error_stat="max")
    with polygraphy(), np.errstate(all="ignore"):  # it divides by zeros for a relative error
        (verdicts,) = Comparator.compare_accuracy([wanted, found], compare_func=judge)[0].values()
    return [Difference(name, _error(verdicts[0].get(name)), bounds[name]) for name in names]


def _keep_last(want: Any, got: Any, names: Sequence[str]) -> None:
    """An engine may give the logits of the last position alone: holds those against it."""
    for name in names:
        shape, other = want[name].shape, got[name].shape
        if len(shape) == len(other) > 1 and other == (shape[0], 1, *shape[2:]) != shape:
            want[name] = np.ascontiguousarray(want[name][:, -1:])


def _largest(array: Array) -> float:
    return float(np.nan_to_num(np.abs(array.astype(np.float64)), posinf=0.0).max())


def _error(verdict: Any) -> float:
    error = getattr(verdict, "max_absdiff", None)  # there is none where the shapes differ
    return float("inf") if error is None or not np.isfinite(error) else float(error)
