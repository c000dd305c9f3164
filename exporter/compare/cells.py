"""Which cells a comparison times: those of the options that the model reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from exporter.artifacts import Phase
from exporter.compare.arms import Pair
from exporter.errors import ComparisonError

if TYPE_CHECKING:
    from exporter.compare.generating import GenerationCell
    from exporter.engines.inputs import Shape


class _Sized(Protocol):
    @property
    def total_length(self) -> int: ...


_S = TypeVar("_S", bound=_Sized)


def shapes(pair: Pair) -> list[Shape]:
    """Single runs of the graph.

    Args:
        pair: The baseline is entered.

    Raises:
        ComparisonError: No cell is left to time.
    """
    from exporter.engines.inputs import Shape, has_cache

    options, cached = pair.options, has_cache(pair.baseline.runner.inputs)
    phase: Phase = "prefill" if cached else "encode"
    found = [Shape(phase, b, n) for n in options.prefill_lengths for b in options.batches]
    if cached:
        pasts = options.decode_past_lengths
        found += [Shape("decode", b, 1, n) for n in pasts for b in options.batches]
    if not found and not options.timing.generate:
        raise ComparisonError(
            f"{pair.baseline.folder.onnx} has no KV cache, so there is no decode step to time.",
            "Give input lengths with --prefill.",
        )
    return _within_reach(pair, found)


def generations(pair: Pair) -> list[GenerationCell]:
    """Whole generations.

    Args:
        pair: The baseline is entered.

    Raises:
        ComparisonError: No cell is left to time, or the model has no cache.
    """
    from exporter.compare.generating import GenerationCell
    from exporter.engines.inputs import has_cache

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
