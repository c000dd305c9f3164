"""Measures what cuts do to a model's answers, each from the first changed layer on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Generic, Protocol, Self

from exporter.errors import ScoringError
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import D, D_co, joined
from exporter.models.ablation.streams import StreamRunner, Streams
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch

    from exporter.models.tasks import Task
    from exporter.models.texts.samples import Batch

KEPT_BYTES = 1 << 30

Within = Callable[[], AbstractContextManager[None]]
"""Makes what a model runs in, such as other weights."""


class Answers(Protocol[D_co]):
    """The whole model's answers to some samples, that cut ones are held against."""

    @property
    def nbytes(self) -> int:
        """Memory that they take, in bytes."""

    @property
    def is_finite(self) -> bool:
        """Whether they are."""

    def damage(self, logits: torch.Tensor, /) -> D_co:
        """Holds a cut model's answers against these."""


class CutMeter(Generic[D]):
    """Holds cut models against the whole one on what they are asked.

    The whole model's answers are kept between calls as far as there is room.
    """

    def __init__(
        self,
        task: Task[D],
        batches: Sequence[Batch],
        positions: int = 1,
        *,
        kept_bytes: int = KEPT_BYTES,
        within: Within | None = None,  # None: both are alike
    ) -> None:
        self._task, self._positions, self._within = task, positions, within or nullcontext
        self._same_weights = within is None
        self._batches = {batch.first_sample: batch for batch in batches}
        self._runner = StreamRunner(task.model, task.runs)
        self._kept: dict[int, Answers[D]] = {}
        self._free_bytes = kept_bytes

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self._runner.layers)

    def inside(self, within: Within) -> Self:
        """The same for cut models that run in something else, beside these whole answers."""
        result = copy.copy(self)
        result._within, result._same_weights = within, False
        return result

    def measure(self, cut: BranchReplacements, progress: Progress = QUIET) -> D:
        """What one cut costs."""
        return self.measure_many(cut, [], progress)[0]

    def measure_many(
        self,
        cut: BranchReplacements,
        others: Sequence[BranchReplacements],
        progress: Progress = QUIET,
    ) -> list[D]:
        """What a cut and several others cost; the others run from where they differ from it on."""
        parts: list[list[D]] = [[] for _ in range(len(others) + 1)]
        total = len(self._batches) * (len(others) + 1)
        with progress.task("run with cuts", total=total, unit="batches") as task:
            for start in self._batches:
                for index, damage in enumerate(self.measure_batch(start, cut, others)):
                    parts[index].append(damage)
                    task.advance()
        return [joined(part) for part in parts]

    def measure_batch(
        self, start: int, cut: BranchReplacements, others: Sequence[BranchReplacements]
    ) -> Iterator[D]:
        """What :meth:`measure_many` measures, of one run."""
        batch = self._batches[start]

        def places(hidden: torch.Tensor) -> torch.Tensor:
            return self._task.places(hidden, batch, self._positions)

        def record(cut: BranchReplacements) -> tuple[Streams, torch.Tensor]:
            return self._runner.record(batch.inputs(self._task.model.device), places, cut)

        reference = self._kept.get(start)
        if reference is None and (cut or not self._same_weights):
            reference = self._reference(batch, record({})[1])
        with self._within():
            streams, answers = record(cut)
        reference = reference or self._reference(batch, answers)
        yield damage_of(reference, answers, cut, start)
        for other in others:
            with self._within():
                answers = self._runner.resume(streams, places, other)
            yield damage_of(reference, answers, other, start)

    def _reference(self, batch: Batch, answers: torch.Tensor) -> Answers[D]:
        reference = self._task.reference(answers, batch, self._positions)
        if reference.nbytes <= self._free_bytes:
            self._kept[batch.first_sample] = reference
            self._free_bytes -= reference.nbytes
        return reference


def damage_of(
    reference: Answers[D], answers: torch.Tensor, cut: BranchReplacements, start: int
) -> D:
    """What a cut costs on some samples.

    answers: of the cut one, such as logits `[batch, chosen positions, vocabulary]`.
    """
    import torch

    with torch.inference_mode():
        damage = reference.damage(answers)
    bad = ~damage.finite
    if bad.any():
        names = [f"{kind} {layer}" for layer, kind in cut] if reference.is_finite else []
        what = ", ".join(names) or "nothing"
        raise ScoringError(
            f"The answers are not finite in sample {start + int(bad.argmax())} with {what} cut.",
            "Load the model in float32, or check its weights.",
            code="not-finite",
        )
    return damage
