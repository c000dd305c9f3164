"""A comparison's number of threads: asked for, or found; one for all arms."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError

from exporter.artifacts import ThreadProbe
from exporter.artifacts.store import Store
from exporter.compare.arms import Pair
from exporter.progress import QUIET

if TYPE_CHECKING:
    from exporter.engines.inputs import Shape
    from exporter.engines.runners.base import Runner

_NAME = "threads"


def settle_threads(pair: Pair, store: Store) -> ThreadProbe | None:
    """Gives all arms the number of threads that makes the baseline's step fastest.

    That is its first decode step that is asked for, or its shortest prompt. It is not looked for
    where a number was asked for, and a comparison that goes on keeps the number it began with.

    Args:
        pair: Arms that are not running yet.
        store: What an earlier run of this comparison left, and where this one leaves it.

    Raises:
        BackendError: The baseline can't be loaded or run.
        ComparisonError: There is no step to time.
    """
    from exporter.compare.thread_trial import choose_threads, fastest

    if pair.options.threads is not None or pair.on_gpu:
        return None
    probe = _known(store)
    if probe is None:
        probe = choose_threads(
            pair.baseline.runner,
            lambda: _step(pair),
            vocabulary=pair.vocabulary(),
            progress=pair.progress,
        )
        if probe is not None:
            value = probe.model_dump(mode="json")
            store.keep(_NAME, value, key=_NAME, at_once=False)
    if probe is not None:
        for arm in pair.arms.values():
            _set(arm.builds, fastest(probe))
    return probe


def _known(store: Store) -> ThreadProbe | None:
    kept = store.find(_NAME, key=_NAME)
    with contextlib.suppress(ValidationError):
        return None if kept is None else ThreadProbe.model_validate(kept)
    return None


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
