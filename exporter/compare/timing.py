"""The rows of latency: which cells are timed, and all arms timed at each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from exporter.artifacts import LatencyRow, MachineState, Phase, library_versions
from exporter.compare.arms import ComparedArm, Pair
from exporter.errors import ComparisonError

if TYPE_CHECKING:
    from exporter.compare.generating import GenerationCell
    from exporter.generation.decoder import Decoder
    from exporter.measure.inputs import Shape
    from exporter.measure.latency import Sampling
    from exporter.measure.timing.chunk import Memory
    from exporter.measure.timing.probe import Cell, Subject


class _Sized(Protocol):
    @property
    def total_length(self) -> int: ...


_S = TypeVar("_S", bound=_Sized)


@dataclass
class Timed:
    """All rows, and the machine while they were taken."""

    rows: list[LatencyRow] = field(default_factory=list)
    states: list[MachineState] = field(default_factory=list)


def time_all(pair: Pair, resume: Path | None = None) -> Timed:
    """Times all arms at every cell of the options that the model reaches.

    Args:
        pair: Running arms.
        resume: Where a run that was cut short kept what it had timed, and this one keeps it.

    Raises:
        ComparisonError: No cell is left to time, or the clock jumps.
        BackendError: A run fails.
    """
    from exporter.measure.timing.subjects import RunnerSubject

    shapes, generations = _shapes(pair), _generations(pair)
    vocabulary = pair.vocabulary()
    arms = {name: RunnerSubject(arm.builds, vocabulary) for name, arm in _arms(pair).items()}
    watch = _Watch(pair, resume)
    if shapes:
        watch.measure(arms, shapes)
    if generations:
        # One kind of arms at a time: each holds the weights.
        for arm in arms.values():
            arm.unload()
        try:
            watch.generate(pair, vocabulary, generations)
        finally:
            for arm in arms.values():
                arm.load()
    return watch.timed


class _Watch:
    """Measures, and looks at the machine in between."""

    def __init__(self, pair: Pair, resume: Path | None) -> None:
        from exporter.measure.environment import ThrottleCounts

        self.timed = Timed()
        self._pair = pair
        self._begin = time.monotonic()
        self._memory = _memory(pair, resume)
        self._gpu = pair.on_gpu
        self._throttle = ThrottleCounts()
        self._look()

    def measure(self, arms: Mapping[str, Subject], cells: Sequence[Cell]) -> None:
        from exporter.measure.latency import measure_rows

        self.timed.rows += measure_rows(
            arms,
            cells,
            _sampling(self._pair),
            memory=self._memory,
            paired=len(self._pair.judged),
            after_chunk=self._look,
            progress=self._pair.progress,
        )

    def generate(self, pair: Pair, vocabulary: int, cells: Sequence[GenerationCell]) -> None:
        arms = _decoders(pair, vocabulary)
        for arm in arms.values():
            arm.load()
        try:
            self.measure(arms, cells)
        finally:
            for arm in arms.values():
                arm.unload()

    def _look(self) -> None:
        from exporter.measure.environment import machine_state

        seconds = time.monotonic() - self._begin
        self.timed.states.append(machine_state(seconds, self._throttle, gpu=self._gpu))


def _arms(pair: Pair) -> dict[str, ComparedArm]:
    return {"baseline": pair.baseline, "candidate": pair.candidate, **pair.references}


def _sampling(pair: Pair) -> Sampling:
    from exporter.measure.latency import Sampling

    timing = pair.options.timing
    return Sampling(
        seconds=timing.time_budget_s,
        rounds=pair.options.rounds,
        threshold=timing.threshold,
        reload=timing.reload,
    )


def _memory(pair: Pair, resume: Path | None) -> Memory | None:
    from exporter.compare.journal import Journal
    from exporter.measure.environment import environment

    if resume is None:
        return None
    runner = pair.baseline.runner
    machine = environment(threads=runner.threads, gpu=pair.on_gpu)
    same = ("machine", "processor", "cpu_count", "threads", "python", "gpu", "affinity")
    key: dict[str, Any] = {
        "arms": {name: _identity(arm) for name, arm in _arms(pair).items()},
        "options": [pair.options.rounds, vars(pair.options.timing)],
        "versions": library_versions(),
        "machine": {name: getattr(machine, name) for name in same},
    }
    journal = Journal(resume, key)
    if journal.chunks:
        pair.progress.say(f"time: going on with {journal.chunks} parts that an earlier run timed")
    return journal


def _identity(arm: ComparedArm) -> list[str]:
    engines = [engine.sha256 for engine in arm.engines]
    return [arm.runner.backend, arm.runner.provider, arm.facts.sha256, *engines]


def _shapes(pair: Pair) -> list[Shape]:
    from exporter.measure.inputs import Shape, has_cache

    options, cached = pair.options, has_cache(pair.baseline.runner.inputs)
    phase: Phase = "prefill" if cached else "encode"
    shapes = [Shape(phase, b, n) for n in options.prefill_lengths for b in options.batches]
    if cached:
        pasts = options.decode_past_lengths
        shapes += [Shape("decode", b, 1, n) for n in pasts for b in options.batches]
    if not shapes and not options.timing.generate:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no KV cache, so there is no decode step to time.",
            "Give input lengths with --prefill.",
        )
    return _within_reach(pair, shapes)


def _generations(pair: Pair) -> list[GenerationCell]:
    from exporter.compare.generating import GenerationCell
    from exporter.measure.inputs import has_cache

    options = pair.options
    cells = [
        GenerationCell(batch, prompt, new)
        for prompt, new in options.timing.generate
        for batch in options.batches
    ]
    if cells and not has_cache(pair.baseline.runner.inputs):
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no KV cache, so it can't generate.",
            "Leave --generate out.",
        )
    return _within_reach(pair, cells)


def _decoders(pair: Pair, vocabulary: int) -> dict[str, Subject]:
    from exporter.compare.generating import DecoderSubject

    found: dict[str, Subject] = {}
    for name, arm in _arms(pair).items():
        if arm.runner.backend.startswith("torch") or arm.runner.backend == "pytorch":
            if name not in pair.references:
                raise ComparisonError(
                    "Whole generations by PyTorch aren't timed.", "Leave --generate out."
                )
            pair.progress.say(f"generate: left out for {name}, which PyTorch runs")
            continue
        found[name] = DecoderSubject(_decoders_of(arm, pair.options.provider), vocabulary)
    return found


def _decoders_of(arm: ComparedArm, provider: str) -> list[Decoder]:
    """One for each build."""
    from exporter.backends.tensorrt import TensorRtRunner
    from exporter.generation.onnxruntime_decoder import OnnxRuntimeDecoder
    from exporter.generation.tensorrt_decoder import TensorRtDecoder

    return [
        TensorRtDecoder(runner.engines)
        if isinstance(runner, TensorRtRunner)
        else OnnxRuntimeDecoder(arm.folder.onnx, provider=provider, threads=runner.threads)
        for runner in arm.builds
    ]


def _within_reach(pair: Pair, cells: list[_S]) -> list[_S]:
    longest = pair.baseline.folder.longest_sequence
    fitting = [cell for cell in cells if longest is None or cell.total_length <= longest]
    for cell in cells:
        if cell not in fitting:
            pair.progress.say(f"{cell}: left out, the model ends at {longest} positions")
    if cells and not fitting:
        raise ComparisonError(
            f"The model ends at {longest} positions: no shape is left to time.",
            "Ask for shorter prompts and caches.",
        )
    return fitting
