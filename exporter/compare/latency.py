"""The rows of latency: all arms timed at each cell of the options that the model reaches."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import Environment, LatencyRow, MachineState
from exporter.artifacts.base import IMAGES
from exporter.artifacts.latency import Shape
from exporter.artifacts.store import Store
from exporter.compare.arms import Comparison
from exporter.compare.timing.measuring import TimingBudget, measure_rows
from exporter.compare.timing.subjects import (
    Builds,
    Clock,
    Probe,
    RunnerArm,
    Sample,
    TimedArm,
    loaded,
)
from exporter.engines.decoding.decoder import Decoder
from exporter.engines.decoding.generate import own_decoder
from exporter.engines.environment import (
    GpuWatch,
    MachineWatch,
    ThrottleCounts,
    doubt,
    machine_state,
)
from exporter.engines.tensors import has_cache, random_tokens, whole_phase
from exporter.errors import BackendError, ComparisonError, DisturbedMachineError
from exporter.processes import cpu_times, other_cpu_share
from exporter.report.sections.arms import machine_remarks


class TimingSession:
    """Measures between ``__enter__`` and ``__exit__``, and looks at the machine meanwhile."""

    def __init__(self, comparison: Comparison, store: Store | None) -> None:
        self.rows: list[LatencyRow] = []
        self.states: list[MachineState] = []
        self.other_cpu_share: float | None = None
        self._comparison, self._store = comparison, store
        self._threads, self._progress = comparison.whole.runner.threads, comparison.progress
        self._watch = GpuWatch() if comparison.on_gpu else None
        self._entered = ExitStack()
        self._warned = False

    def seen_on(self, machine: Environment) -> Environment:
        """The machine with what was seen of it meanwhile, and what the rounds' order is of."""
        seen = ("other_cpu_share", "states")
        return machine.model_copy(update={name: getattr(self, name) for name in seen})

    def __enter__(self) -> Self:
        """Takes a first look at the machine."""
        self._before = cpu_times()
        if self._watch is not None:
            self._entered.enter_context(self._watch)
        self._begin = time.monotonic()
        self._throttle, self._machine = ThrottleCounts(), MachineWatch(self._threads)
        self._look()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        """Says what of the machine makes times doubtful."""
        self._entered.close()
        if kind is not None:
            return
        self.other_cpu_share = other_cpu_share(self._before, cpu_times())
        for remark in machine_remarks(self.states, self._threads):
            self._progress.say(f"time: {remark}")

    def measure(
        self, arms: Mapping[str, TimedArm], cells: Sequence[Shape], *, together: bool
    ) -> None:
        """Adds the rows of all arms at all cells; see :func:`measure_rows`."""
        options = self._comparison.options
        budget = TimingBudget(
            seconds=options.timing.time_budget_s,
            rounds=options.rounds,
            threshold=options.timing.threshold,
            reload=options.timing.reload,
            seed=secrets.randbits(32),
        )
        self.rows += measure_rows(
            arms,
            cells,
            budget,
            store=self._store,
            paired=len(self._comparison.judged),
            together=together and not self._comparison.in_turns,
            after_chunk=self._look,
            progress=self._progress,
        )

    def _look(self) -> None:
        state = machine_state(self._throttle, self._watch, self._machine)
        self.states.append(state)
        reason = doubt(self.states)
        if reason and self._comparison.options.timing.on_disturbance == "stop":
            raise DisturbedMachineError(
                f"The measurement is disturbed: {reason}.",
                "Measure on a quieter machine, or with --on-disturbance warn to go on; what was "
                "timed is kept in the output folder.",
                code="disturbed-machine",
            )
        if reason and not self._warned:
            self._progress.say(f"time: the measurement is disturbed: {reason}")
            self._warned = True


@dataclass(frozen=True)
class GenerationProbe:
    """Generates greedily from the same prompt each time."""

    decoder: Decoder
    prompt: NDArray[np.int64]  # `[batch, sequence]`
    new_tokens: int

    def sample(self, clock: Clock) -> Sample:
        """Generates once."""
        decoder = self.decoder
        begin = clock()
        context = self.prompt.shape[1] + self.new_tokens
        logits = decoder.prefill(self.prompt, context=context)
        token = logits.argmax(axis=-1)
        first = clock()
        for _ in range(self.new_tokens - 1):
            logits = decoder.step(token[:, None])
            token = logits.argmax(axis=-1)
        end = clock()
        if np.isnan(logits).any():
            raise BackendError("The model gives NaN logits, so there is no next token.")
        later = (end - first) / (self.new_tokens - 1)
        return ((first - begin) / 1e6, later / 1e6, (end - begin) / 1e6)


class DecoderArm(Builds[Decoder]):
    """An arm that generates."""

    def probe(self, cell: Shape) -> Probe:
        """Binds the same random prompt for every arm."""
        prompt = random_tokens(cell, self._vocabulary)
        return GenerationProbe(self.current, prompt, cell.new_tokens)


def time_all(comparison: Comparison, store: Store | None = None) -> TimingSession:
    """Times all arms at every cell of the options that the model reaches."""
    shapes, generations = cells_of(comparison)
    arms = comparison.timed()
    with TimingSession(comparison, store) as session:
        if shapes:
            session.measure(arms, shapes, together=True)
        if generations:
            _time_generations(comparison, session, arms, generations)
    return session


def _time_generations(
    comparison: Comparison,
    session: TimingSession,
    runs: Mapping[str, RunnerArm],
    cells: Sequence[Shape],
) -> None:
    """Whole generations, one kind of arms at a time: each holds the weights."""
    with ExitStack() as stack:
        for run in runs.values():
            run.unload()
            stack.callback(run.load)
        arms = _decoder_arms(comparison, max(cell.batch for cell in cells))
        every = [arm.every for arm in arms.values()]
        fit = stack.enter_context(loaded(every, comparison.progress))
        session.measure(arms, cells, together=fit)


def _decoder_arms(comparison: Comparison, batch: int) -> dict[str, DecoderArm]:
    vocabulary, decoder_arms = comparison.vocabulary(), dict[str, DecoderArm]()
    for name, arm in comparison.arms.items():
        one = batch > 1 and arm.runner.capabilities.one_text
        decoders = [] if one else [own_decoder(runner) for runner in arm.builds]
        own = [decoder for decoder in decoders if decoder is not None]
        if own:
            decoder_arms[name] = DecoderArm(own, vocabulary)
        elif name not in comparison.pair:
            comparison.leave_out(f"generate: left out for {name}, which {arm.runner.backend} runs")
        else:
            raise ComparisonError(
                f"Whole generations by {arm.runner.backend} aren't timed.",
                "Leave --generate out.",
                code="nothing-to-time",
            )
    return decoder_arms


def cells_of(comparison: Comparison) -> tuple[list[Shape], list[Shape]]:
    """What is timed: single runs, and whole generations."""
    if (own := comparison.whole.cells) is not None:
        return own(comparison.options, comparison.leave_out)
    return shapes_of(comparison), generations_of(comparison)


def shapes_of(comparison: Comparison) -> list[Shape]:
    """Single runs of the graph."""
    options, inputs = comparison.options, comparison.whole.runner.inputs
    if comparison.reads_images:
        # All images have one size; a token stands for each of their patches.
        patches = comparison.whole.folder.patches
        return [Shape("encode", b, patches, counts=IMAGES.parts) for b in options.batches]
    cached, phase = has_cache(inputs), whole_phase(inputs)
    shapes = [Shape(phase, b, n) for n in options.prompt_lengths for b in options.batches]
    if cached:
        pasts = options.decode_past_lengths
        shapes += [Shape("decode", b, 1, n) for n in pasts for b in options.batches]
    if not shapes and not options.timing.generate:
        raise ComparisonError(
            f"{comparison.whole.folder.onnx} has no KV cache, so there is no decode step to time.",
            "Give input lengths with --prefill.",
            code="no-kv-cache",
        )
    return _within_reach(comparison, shapes)


def generations_of(comparison: Comparison) -> list[Shape]:
    """Whole generations."""
    options = comparison.options
    cells = [
        Shape("prefill", batch, prompt, new_tokens=new)
        for prompt, new in options.timing.generate
        for batch in options.batches
    ]
    if cells and not has_cache(comparison.whole.runner.inputs):
        raise ComparisonError(
            f"{comparison.whole.folder.onnx} has no KV cache, so it can't generate.",
            "Leave --generate out.",
            code="no-kv-cache",
        )
    result = _within_reach(comparison, cells)
    sides = [comparison.arms[name].runner for name in comparison.pair]
    alone = next((side.backend for side in sides if side.capabilities.one_text), "")
    if alone and max((cell.batch for cell in result), default=1) > 1:
        raise ComparisonError(
            f"Whole generations by {alone} are timed for one text at a time.",
            "Take --batch 1, or leave --generate out.",
            code="nothing-to-time",
        )
    return result


def _within_reach(comparison: Comparison, cells: list[Shape]) -> list[Shape]:
    longest = comparison.whole.folder.longest_sequence
    fitting = [cell for cell in cells if longest is None or cell.total_length <= longest]
    for cell in cells:
        if cell not in fitting:
            comparison.leave_out(f"{cell}: left out, the model ends at {longest} positions")
    if cells and not fitting:
        raise ComparisonError(
            f"The model ends at {longest} positions: no shape is left to time.",
            "Ask for shorter prompts and caches.",
            code="nothing-to-time",
        )
    return fitting
