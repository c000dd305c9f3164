"""A comparison's number of threads: asked for, or found; one for all arms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from exporter.artifacts import ThreadProbe
from exporter.compare.arms import Pair
from exporter.compare.journal import Journal
from exporter.progress import QUIET

if TYPE_CHECKING:
    from exporter.engines.inputs import Shape
    from exporter.engines.runners.base import Runner


def settle_threads(pair: Pair, journal: Journal | None) -> ThreadProbe | None:
    """Gives all arms the number of threads that makes the baseline's step fastest.

    That is its first decode step that is asked for, or its shortest prompt. It is not looked for
    where a number was asked for, and a comparison that goes on keeps the number it began with.

    Args:
        pair: Arms that are not running yet.
        journal: What an earlier run of this comparison left, and where this one leaves it.

    Raises:
        BackendError: The baseline can't be loaded or run.
        ComparisonError: There is no step to time.
    """
    from exporter.compare.thread_trial import choose_threads, fastest

    if pair.options.threads is not None or pair.on_gpu:
        return None
    probe = None if journal is None else journal.probe
    if probe is None:
        probe = choose_threads(
            pair.baseline.runner,
            lambda: _step(pair),
            vocabulary=pair.vocabulary(),
            progress=pair.progress,
        )
        if probe is not None and journal is not None:
            journal.keep_probe(probe)
    if probe is not None:
        for arm in pair.arms.values():
            _set(arm.builds, fastest(probe))
    return probe


def _set(runners: tuple[Runner, ...], threads: int) -> None:
    for runner in runners:
        if runner.capabilities.device == "cpu":  # one thread feeds a GPU
            runner.threads = threads


def _step(pair: Pair) -> Shape:
    from exporter.compare.cells import generations, shapes
    from exporter.engines.inputs import Shape

    quiet = replace(pair, progress=QUIET)  # what is left out is told when the others are timed
    asked = shapes(quiet)
    if not asked:
        cell = generations(quiet)[0]
        return Shape("decode", cell.batch, 1, cell.sequence_length)
    decoding = [shape for shape in asked if shape.phase == "decode"]
    return (decoding or sorted(asked, key=lambda shape: shape.batch * shape.sequence_length))[0]
