"""The rows of latency: all arms timed at each cell of the options that the model reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, TypeVar

from exporter.artifacts.latency import Shape
from exporter.artifacts.nouns import IMAGES
from exporter.artifacts.store import Store
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.generating import DecoderArm, GenerationCell
from exporter.compare.timing.subjects import RunnerArm
from exporter.compare.timing_session import Timed, TimingSession
from exporter.engines.decoding.open_decoder import own_decoder
from exporter.engines.inputs import has_cache, whole_phase
from exporter.engines.runners.llama_cpp import LlamaCppRunner
from exporter.engines.runners.tensorrt import IN_TURNS, OnEngines, fit_together
from exporter.errors import ComparisonError


def time_all(pair: Pair, store: Store | None = None) -> Timed:
    """Times all arms at every cell of the options that the model reaches.

    Args:
        pair: Running arms.
        store: What a run that was cut short had timed, and where this one keeps its times.

    Raises:
        ComparisonError: No cell is left to time, or the clock jumps.
        BackendError: A run fails.
    """
    shapes, generations = shapes_of(pair), generations_of(pair)
    vocabulary = pair.vocabulary()
    arms = {name: RunnerArm(arm.builds, vocabulary) for name, arm in pair.arms.items()}
    with TimingSession(
        pair.options,
        pair.baseline.runner.threads,
        on_gpu=pair.on_gpu,
        paired=len(pair.judged),
        store=store,
        progress=pair.progress,
    ) as session:
        if shapes:
            session.measure(arms, shapes, together=not pair.in_turns)
        if generations:
            _Generations(pair, session).apart(arms, vocabulary, generations)
    return session.timed


@dataclass(frozen=True)
class _Generations:
    """Times whole generations."""

    pair: Pair
    session: TimingSession

    def apart(
        self, runs: Mapping[str, RunnerArm], vocabulary: int, cells: Sequence[GenerationCell]
    ) -> None:
        """One kind of arms at a time: each holds the weights."""
        for arm in runs.values():
            arm.unload()
        try:
            self._together(vocabulary, cells)
        finally:
            for arm in runs.values():
                arm.load()

    def _together(self, vocabulary: int, cells: Sequence[GenerationCell]) -> None:
        arms = _decoder_arms(self.pair, vocabulary, max(cell.batch for cell in cells))
        try:
            fit = fit_together(lambda: _load(arms), _on_engines(arms))
            if not fit:
                self.pair.progress.say(IN_TURNS)
            together = fit and not self.pair.in_turns
            self.session.measure(arms, cells, together=together)
        finally:
            for arm in arms.values():
                arm.unload()


def _load(arms: Mapping[str, DecoderArm]) -> None:
    with ExitStack() as stack:
        for arm in arms.values():
            arm.load()
            stack.callback(arm.unload)
        stack.pop_all()


def _on_engines(arms: Mapping[str, DecoderArm]) -> list[OnEngines]:
    return [each for arm in arms.values() for each in arm.every if isinstance(each, OnEngines)]


def _decoder_arms(pair: Pair, vocabulary: int, batch: int) -> dict[str, DecoderArm]:
    found: dict[str, DecoderArm] = {}
    for name, arm in pair.arms.items():
        one = batch > 1 and _one_text(arm)
        decoders = [] if one else [own_decoder(runner) for runner in arm.builds]
        own = [decoder for decoder in decoders if decoder is not None]
        if own:
            found[name] = DecoderArm(own, vocabulary)
        elif name in pair.references:
            pair.progress.say(f"generate: left out for {name}, which {arm.runner.backend} runs")
        else:
            raise ComparisonError(
                f"Whole generations by {arm.runner.backend} aren't timed.", "Leave --generate out."
            )
    return found


def shapes_of(pair: Pair) -> list[Shape]:
    """Single runs of the graph.

    Args:
        pair: The baseline is entered.

    Raises:
        ComparisonError: No cell is left to time.
    """
    options, inputs = pair.options, pair.baseline.runner.inputs
    if pair.reads_images:
        # All images have one size; a token stands for each of their patches.
        patches = pair.baseline.folder.patches
        return [Shape("encode", b, patches, counts=IMAGES.parts) for b in options.batches]
    cached, phase = has_cache(inputs), whole_phase(inputs)
    found = [Shape(phase, b, n) for n in options.prompt_lengths for b in options.batches]
    if cached:
        pasts = options.decode_past_lengths
        found += [Shape("decode", b, 1, n) for n in pasts for b in options.batches]
    if not found and not options.timing.generate:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no KV cache, so there is no decode step to time.",
            "Give input lengths with --prefill.",
            code="no-kv-cache",
        )
    return _within_reach(pair, found)


def generations_of(pair: Pair) -> list[GenerationCell]:
    """Whole generations.

    Args:
        pair: The baseline is entered.

    Raises:
        ComparisonError: No cell is left to time, the model has no cache, or an arm generates one
            text at a time.
    """
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
            code="no-kv-cache",
        )
    found = _within_reach(pair, cells)
    judged = [arm for name, arm in pair.arms.items() if name not in pair.references]
    if max((cell.batch for cell in found), default=1) > 1 and any(map(_one_text, judged)):
        raise ComparisonError(
            f"Whole generations by {LlamaCppRunner.backend} are timed for one text at a time.",
            "Take --batch 1, or leave --generate out.",
            code="one-text-at-a-time",
        )
    return found


def _one_text(arm: ComparedArm) -> bool:
    """Whether its caches hold one text, so that more would be run from their start each step."""
    return arm.runner.backend == LlamaCppRunner.backend


class _Reaches(Protocol):
    @property
    def total_length(self) -> int: ...


_R = TypeVar("_R", bound=_Reaches)


def _within_reach(pair: Pair, cells: list[_R]) -> list[_R]:
    longest = pair.baseline.folder.longest_sequence
    fitting = [cell for cell in cells if longest is None or cell.total_length <= longest]
    for cell in cells:
        if cell not in fitting:
            pair.progress.say(f"{cell}: left out, the model ends at {longest} positions")
    if cells and not fitting:
        raise ComparisonError(
            f"The model ends at {longest} positions: no shape is left to time.",
            "Ask for shorter prompts and caches.",
            code="no-shape-left",
        )
    return fitting
