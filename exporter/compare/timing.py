"""The rows of latency: which shapes are timed, and both arms timed at each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.artifacts import LatencyRow, Phase
from exporter.compare.arms import Pair
from exporter.errors import ComparisonError

if TYPE_CHECKING:
    from exporter.measure.inputs import Shape


def latency_rows(pair: Pair) -> list[LatencyRow]:
    """Times both arms at every shape of the options that the model reaches.

    Raises:
        ComparisonError: No shape is left to time.
        BackendError: A run fails.
    """
    from exporter.measure.latency import Sampling, measure_row

    sampling = Sampling(rounds=pair.options.rounds)
    return [
        measure_row(*pair.runners, shape, pair.vocabulary(), sampling, progress=pair.progress)
        for shape in _shapes(pair)
    ]


def _shapes(pair: Pair) -> list[Shape]:
    from exporter.measure.inputs import Shape, has_cache

    options, cached = pair.options, has_cache(pair.baseline.runner.inputs)
    phase: Phase = "prefill" if cached else "encode"
    shapes = [Shape(phase, options.batch, length) for length in options.prefill_lengths]
    if cached:
        shapes += [Shape("decode", options.batch, 1, n) for n in options.decode_past_lengths]
    if not shapes:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no KV cache, so there is no decode step to time.",
            "Give input lengths with --prefill.",
        )
    return _within_reach(pair, shapes)


def _within_reach(pair: Pair, shapes: list[Shape]) -> list[Shape]:
    longest = pair.baseline.folder.longest_sequence
    fitting = [s for s in shapes if longest is None or s.total_length <= longest]
    for shape in shapes:
        if shape not in fitting:
            pair.progress.say(f"{shape}: left out, the model ends at {longest} positions")
    if not fitting:
        raise ComparisonError(
            f"The model ends at {longest} positions: no shape is left to time.",
            "Ask for shorter prompts and caches.",
        )
    return fitting
