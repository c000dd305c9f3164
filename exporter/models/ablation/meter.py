"""Measures what cuts do to a language model's answers, each from the first changed layer on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ScoringError
from exporter.models.ablation.branch_replacements import BranchReplacements
from exporter.models.ablation.damage import Damage, Reference, joined
from exporter.models.ablation.streams import StreamRunner
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
        self._ids, self._mask = input_ids, mask
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
        total = len(self.starts) * (len(others) + 1)
        with progress.task("run with cuts", total=total) as task:
            for start in self.starts:
                for index, damage in enumerate(self.measure_batch(start, cut, others)):
                    parts[index].append(damage)
                    task.advance()
        return [joined(found) for found in parts]

    @property
    def starts(self) -> range:
        """The first sample of each batch."""
        return range(0, len(self._ids), self._batch_size)

    def measure_batch(
        self, start: int, cut: BranchReplacements, others: Sequence[BranchReplacements]
    ) -> Iterator[Damage]:
        """What :meth:`measure_many` measures, of one batch.

        Args:
            start: The batch's first sample, one of :attr:`starts`.
            cut: The one that is run whole.
            others: Those that run from where they differ from it on.

        Yields:
            The damage of ``cut``, then of each other, when it is known.

        Raises:
            ScoringError: Logits are not finite.
        """
        inputs = self._inputs(start)
        reference = self._kept.get(start)
        if not cut and reference is None:
            streams, logits = self._runner.record(inputs, cut)
            reference = self._reference(start, logits)
        else:
            reference = reference or self._reference(start, self._runner.record(inputs, {})[1])
            streams, logits = self._runner.record(inputs, cut)
        yield judged(reference, logits, cut, start)
        for other in others:
            yield judged(reference, self._runner.resume(streams, other), other, start)

    def _inputs(self, start: int) -> dict[str, torch.Tensor]:
        import torch

        device, rows = self._model.device, slice(start, start + self._batch_size)
        ids = torch.from_numpy(self._ids[rows]).to(device)
        mask = torch.from_numpy(self._mask[rows]).to(device)
        return {"input_ids": ids, "attention_mask": mask.long()}

    def _reference(self, start: int, logits: torch.Tensor) -> Reference:
        rows = slice(start, start + self._batch_size)
        reference = reference_of(logits, self._ids[rows], self._mask[rows], self._stride)
        if reference.nbytes <= self._free_bytes:
            self._kept[start] = reference
            self._free_bytes -= reference.nbytes
        return reference


def reference_of(
    logits: torch.Tensor, ids: NDArray[np.int64], mask: NDArray[np.bool_], positions: int
) -> Reference:
    """The whole model's answers for some samples, as what cut ones are held against.

    Args:
        logits: ``[batch, chosen positions, vocabulary]``.
        ids: ``[batch, tokens]``.
        mask: ``[batch, tokens]``; False marks padding.
        positions: Every so many positions are chosen, the first included.
    """
    import torch

    follows = np.zeros_like(mask)
    follows[:, :-1] = mask[:, :-1] & mask[:, 1:]
    targets = np.roll(ids, -1, axis=1)[:, ::positions]
    device = logits.device
    with torch.inference_mode():
        return Reference(
            logits,
            torch.from_numpy(targets.copy()).to(device),
            torch.from_numpy(follows[:, ::positions].copy()).to(device),
        )


def judged(
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
