"""Measures what cuts do to the classes that a model gives texts, or each of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.ablation.damage import ClassDamage
from exporter.models.ablation.meter import KEPT_BYTES, CutMeter, Within
from exporter.models.texts.batches import Batch, batches_of

if TYPE_CHECKING:
    import torch

_OF_TEXTS = 2  # the rank of logits of one distribution for each text


def by_position(logits: torch.Tensor) -> torch.Tensor:
    """Logits as ``[batch, positions, classes]``, of a text one position.

    A single logit is that of a yes, as rerankers have it: it makes two classes, the yes second.

    Args:
        logits: ``[batch, classes]`` or ``[batch, tokens, classes]``.
    """
    import torch

    found = logits[:, None] if logits.ndim == _OF_TEXTS else logits
    return torch.cat([torch.zeros_like(found), found], -1) if found.shape[-1] == 1 else found


def positions_of(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Which positions of :func:`by_position` count, ``[batch, positions]``: all but padding."""
    return mask[:, :1] | True if logits.ndim == _OF_TEXTS else mask


class ClassReference:
    """The whole model's distributions over classes of a batch.

    Args:
        logits: ``[batch, classes]``, or ``[batch, tokens, classes]``.
        mask: ``[batch, tokens]``, boolean; False marks padding.
    """

    def __init__(self, logits: torch.Tensor, mask: torch.Tensor) -> None:
        self._mask = positions_of(logits, mask)
        self._log_p = by_position(logits.double()).log_softmax(-1)

    @property
    def nbytes(self) -> int:
        """Memory of the distributions, in bytes."""
        return self._log_p.numel() * self._log_p.element_size()

    @property
    def is_finite(self) -> bool:
        """Whether the whole model's own answers are."""
        return bool(self._log_p[self._mask].isfinite().all())

    def damage(self, logits: torch.Tensor) -> ClassDamage:
        """Holds a cut model's logits against these; of the same shape."""
        log_q = by_position(logits.double()).log_softmax(-1)
        kl = (self._log_p.exp() * (self._log_p - log_q)).sum(-1)
        same = log_q.argmax(-1) == self._log_p.argmax(-1)
        return ClassDamage(
            *(
                (values.double() * self._mask).sum(-1).cpu().numpy()
                for values in (self._mask, kl.where(self._mask, 0.0), same)
            )
        )


class ClassMeter(CutMeter[ClassDamage]):
    """Holds cut models' classes of fixed texts against the whole one's.

    Args:
        model: A transformers model that gives texts or their tokens classes, in eval mode.
        input_ids: ``[samples, tokens]``, int64; a sample is a text.
        mask: ``[samples, tokens]``, boolean; False marks padding.
        batch_size: Texts in one forward pass.
        kept_bytes: See :class:`CutMeter`.
        within: See :class:`CutMeter`.

    Raises:
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """

    def __init__(
        self,
        model: Any,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.bool_],
        *,
        batch_size: int = 4,
        kept_bytes: int = KEPT_BYTES,
        within: Within | None = None,
    ) -> None:
        asked = [_Classified(each.trimmed()) for each in batches_of(input_ids, mask, batch_size)]
        super().__init__(model, asked, kept_bytes=kept_bytes, within=within, runs="all")


@dataclass(frozen=True, eq=False)
class _Classified:
    """The classes of a batch of texts."""

    batch: Batch

    @property
    def first_sample(self) -> int:
        return self.batch.first_sample

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        return self.batch.inputs(device)

    def places(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def answers(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def reference(self, answers: torch.Tensor) -> ClassReference:
        return ClassReference(answers, self.batch.mask_on(answers.device))
