"""Measures what cuts do to the classes that a model gives texts, their tokens, or images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.ablation.damage import ClassDamage
from exporter.models.ablation.meter import KEPT_BYTES, CutMeter, OfBatch, Within
from exporter.models.model_folder import OF_IMAGES
from exporter.models.texts.batches import Sources, batches_of

if TYPE_CHECKING:
    import torch

_OF_WHOLES = ("ForSequenceClassification", OF_IMAGES)
MULTI_LABEL = "multi_label_classification"
_OF_TEXTS = 2  # the rank of logits of one distribution for each text
TWO_TEXTS = 2
"""In one batch at least, so that a reranker has something to order."""


def classifies_tokens(model: Any) -> bool:
    """Whether a classifier gives each token a class, not each text."""
    return type(model).__name__.endswith("ForTokenClassification")


def has_separate_labels(model: Any) -> bool:
    """Whether a classifier answers yes or no for each of its labels, which don't exclude others."""
    told = getattr(model.config, "problem_type", None)
    return told == MULTI_LABEL and type(model).__name__.endswith(_OF_WHOLES)


def by_position(
    logits: torch.Tensor, mask: torch.Tensor, *, separate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions that can be compared, and which of them count.

    A text that gets a class has one position, of separate labels one each. A single logit, by which
    rerankers order texts, says nothing by itself: each two texts of a batch have one position, that
    of the first, for which of them stands higher; the last of an odd number is held against the
    first. A text alone has a yes against a logit of 0.

    Args:
        logits: ``[batch, classes]`` or ``[batch, tokens, classes]``.
        mask: ``[batch, tokens]``, boolean; False marks padding.
        separate: Whether each class is a yes or no of its own.

    Returns:
        Logits ``[batch, positions, classes]``, and ``[batch, positions]``, boolean.
    """
    import torch

    if logits.ndim != _OF_TEXTS:
        return _with_a_no(logits), mask
    counts = torch.ones_like(logits, dtype=torch.bool)
    if separate:
        return _with_a_no(logits[..., None]), counts
    if logits.shape[-1] > 1:
        return logits[:, None], counts[:, :1]
    if len(logits) > 1:
        logits = logits - logits.roll(-1, 0)
        counts[1::2] = False
    return _with_a_no(logits[..., None]), counts


def _with_a_no(logits: torch.Tensor) -> torch.Tensor:
    """A single logit as two classes, the yes second; several as they are."""
    import torch

    if logits.shape[-1] > 1:
        return logits
    return torch.cat([torch.zeros_like(logits), logits], -1)


class ClassReference:
    """The whole model's distributions over classes of a batch.

    Args:
        logits: ``[batch, classes]``, or ``[batch, tokens, classes]``.
        mask: ``[batch, tokens]``, boolean; False marks padding.
        separate: See :func:`by_position`.
    """

    def __init__(self, logits: torch.Tensor, mask: torch.Tensor, *, separate: bool = False) -> None:
        self._tokens, self._separate = mask, separate
        found, self._mask = by_position(logits.double(), mask, separate=separate)
        self._log_p = found.log_softmax(-1)

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
        found, _ = by_position(logits.double(), self._tokens, separate=self._separate)
        log_q = found.log_softmax(-1)
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
        batch_size: Texts in one forward pass; two at least, which rerankers are to order.
        kept_bytes: See :class:`CutMeter`.
        within: See :class:`CutMeter`.
        types: ``[samples, tokens]``, of which text of a pair each token is.
        sources: The images, of a model that classifies those.

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
        types: NDArray[np.int64] | None = None,
        sources: Sources | None = None,
    ) -> None:
        separate, size = has_separate_labels(model), max(batch_size, TWO_TEXTS)
        found = batches_of(input_ids, mask, size, sources, types)
        batches = (each.trimmed() for each in found)
        asked = [_Classified(each, separate) for each in batches]
        super().__init__(model, asked, kept_bytes=kept_bytes, within=within, runs="all")


@dataclass(frozen=True, eq=False)
class _Classified(OfBatch):
    """The classes of a batch of texts."""

    separate: bool

    def reference(self, answers: torch.Tensor) -> ClassReference:
        mask = self.batch.mask_on(answers.device)
        return ClassReference(answers, mask, separate=self.separate)
