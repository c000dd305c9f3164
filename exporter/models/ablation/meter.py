"""Measures what cuts do to a language model's answers, each from the first changed layer on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ScoringError
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import Damage, joined
from exporter.models.ablation.divergences import Reference
from exporter.models.ablation.streams import StreamRunner
from exporter.models.texts.batches import Batch, batches_of
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    import torch

_KEPT_BYTES = 1 << 30


class DamageMeter:
    """Holds cut models against the whole one on fixed samples.

    The whole model's distributions are kept between calls as far as there is room.

    Args:
        model: A transformers model with a language head, in eval mode.
        input_ids: ``[samples, tokens]``, int64.
        mask: ``[samples, tokens]``, boolean; False marks padding.
        batch_size: Samples in one forward pass.
        positions: Answers are compared at every so many positions: the head and the comparison
            cost a fifth of a small model's run. 1 for all.
        kept_bytes: How much of the whole model's distributions is kept between calls, which spares
            later calls a run; 0 for a single call.

    Raises:
        ScoringError: The model has no language head, or there is no position to compare at.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """

    def __init__(
        self,
        model: Any,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.bool_],
        *,
        batch_size: int = 4,
        positions: int = 1,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        refuse_unmeasurable(model, mask, positions)
        self._model = model
        self._batches = batches_of(input_ids, mask, batch_size)
        self._batch_size, self._stride = batch_size, positions
        self._runner = StreamRunner(model, positions)
        self._kept: dict[int, Reference] = {}
        self._free_bytes = kept_bytes

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self._runner.layers)

    def measure(self, cut: BranchReplacements, progress: Progress = QUIET) -> Damage:
        """What one cut costs."""
        return self.measure_many(cut, [], progress)[0]

    def measure_many(
        self,
        cut: BranchReplacements,
        others: Sequence[BranchReplacements],
        progress: Progress = QUIET,
    ) -> list[Damage]:
        """What a cut and several others cost; the others run from where they differ from it on.

        Args:
            cut: The one that is run whole.
            others: Each a whole cut too; sublayers whose replacement is the same object as in
                ``cut`` count as unchanged.
            progress: Told of every run.

        Returns:
            The damage of ``cut``, then of each other in their order.

        Raises:
            ScoringError: Logits are not finite.
        """
        parts: list[list[Damage]] = [[] for _ in range(len(others) + 1)]
        total = len(self._batches) * (len(others) + 1)
        with progress.task("run with cuts", total=total) as task:
            for batch in self._batches:
                found = self.measure_batch(batch.first_sample, cut, others)
                for index, damage in enumerate(found):
                    parts[index].append(damage)
                    task.advance()
        return [joined(part) for part in parts]

    def measure_batch(
        self, start: int, cut: BranchReplacements, others: Sequence[BranchReplacements]
    ) -> Iterator[Damage]:
        """What :meth:`measure_many` measures, of one batch.

        Args:
            start: The batch's first sample.
            cut: The one that is run whole.
            others: Those that run from where they differ from it on.

        Yields:
            The damage of ``cut``, then of each other, when it is known.

        Raises:
            ScoringError: Logits are not finite.
        """
        batch = self._batches[start // self._batch_size]
        inputs = batch.inputs(self._model.device)
        reference = self._kept.get(batch.number)
        if not cut and reference is None:
            streams, logits = self._runner.record(inputs, cut)
            reference = self._reference(batch, logits)
        else:
            reference = reference or self._reference(batch, self._runner.record(inputs, {})[1])
            streams, logits = self._runner.record(inputs, cut)
        yield damage_of(reference, logits, cut, start)
        for other in others:
            yield damage_of(reference, self._runner.resume(streams, other), other, start)

    def _reference(self, batch: Batch, logits: torch.Tensor) -> Reference:
        reference = reference_of(logits, batch, self._stride)
        if reference.nbytes <= self._free_bytes:
            self._kept[batch.number] = reference
            self._free_bytes -= reference.nbytes
        return reference


def reference_of(logits: torch.Tensor, batch: Batch, positions: int) -> Reference:
    """The whole model's answers for some samples, as what cut ones are held against.

    Args:
        logits: ``[batch, chosen positions, vocabulary]``.
        batch: The samples.
        positions: Every so many positions are chosen, the first included.
    """
    import torch

    follows = np.zeros_like(batch.mask)
    follows[:, :-1] = batch.mask[:, :-1] & batch.mask[:, 1:]
    targets = np.roll(batch.ids, -1, axis=1)[:, ::positions]
    device = logits.device
    with torch.inference_mode():
        return Reference(
            logits,
            torch.from_numpy(targets.copy()).to(device),
            torch.from_numpy(follows[:, ::positions].copy()).to(device),
        )


def damage_of(
    reference: Reference, logits: torch.Tensor, cut: BranchReplacements, start: int
) -> Damage:
    """What a cut costs on some samples.

    Args:
        reference: Of the whole model.
        logits: Of the cut one, ``[batch, chosen positions, vocabulary]``.
        cut: For the error.
        start: The number of the first sample, for the error.

    Raises:
        ScoringError: Logits are not finite.
    """
    import torch

    with torch.inference_mode():
        damage = reference.damage(logits)
    bad = ~(np.isfinite(damage.kl_sums) & np.isfinite(damage.nll_sums))
    if bad.any():
        whole = np.isfinite(damage.baseline_nll_sums).all()
        names = [f"{kind} {layer}" for layer, kind in cut] if whole else []
        what = ", ".join(names) or "nothing"
        raise ScoringError(
            f"The logits are not finite in sample {start + int(bad.argmax())} with {what} cut.",
            "Load the model in float32, or check its weights.",
        )
    return damage


def refuse_unmeasurable(model: Any, mask: NDArray[np.bool_], positions: int) -> None:
    """Refuses what damage can't be measured on.

    Args:
        model: The model.
        mask: ``[samples, tokens]``; False marks padding.
        positions: Every so many positions are looked at.

    Raises:
        ScoringError: The model has no language head, or there is no position to compare at.
    """
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ScoringError(
            f"{type(model).__name__} predicts no next token, so damage to its answers can't "
            "be measured.",
            "Use a metric of the residual stream, such as cosine.",
        )
    if not bool((mask[:, 1:] & mask[:, :-1])[:, ::positions].any()):
        raise ScoringError("There is no token with a next one to predict.", "Give longer samples.")
