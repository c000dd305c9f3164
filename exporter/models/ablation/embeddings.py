"""Measures what cuts do to the embeddings of texts: a model without next tokens has no others.

An embedding is made of a text's last hidden states as the model's folder says, else it is their
mean, as sentence encoders are mostly trained; both arms of a comparison are pooled so too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.ablation.classes import ClassMeter
from exporter.models.ablation.damage import EmbeddingDamage
from exporter.models.ablation.meter import (
    KEPT_BYTES,
    CutMeter,
    DamageMeter,
    OfBatch,
    Within,
    judged_by,
)
from exporter.models.sentence_folder import Pooling, pooling_of_model
from exporter.models.texts.batches import Sources, batches_of

if TYPE_CHECKING:
    import torch

    from exporter.models.loading.model_source import LoadedModel
    from exporter.models.texts.calibration import CalibrationText

TEXTS_TOGETHER = 16
"""That are embedded in one run at least, as each is compared with the others of it."""
POSITIONS = 2
"""Searches compare answers at every second position: the head costs a third of a small model."""


def cosines(whole: Any, cut: Any) -> Any:
    """Of pairs of embeddings ``[..., hidden]``, one for each text; NaN where one is zero."""
    lengths = (whole * whole).sum(-1) * (cut * cut).sum(-1)
    return (whole * cut).sum(-1) / lengths**0.5


class EmbeddingReference:
    """The whole model's embeddings of a batch.

    Args:
        embeddings: ``[batch, hidden]``.
    """

    def __init__(self, embeddings: torch.Tensor) -> None:
        self._whole = embeddings.double()

    @property
    def nbytes(self) -> int:
        """Memory of the embeddings, in bytes."""
        return self._whole.numel() * self._whole.element_size()

    @property
    def is_finite(self) -> bool:
        """Whether the whole model's own embeddings are, and none is zero."""
        return bool((self._whole.isfinite().all(-1) & self._whole.any(-1)).all())

    def damage(self, embeddings: torch.Tensor) -> EmbeddingDamage:
        """Holds a cut model's embeddings against these; ``[batch, hidden]``."""
        cut = embeddings.double()
        pairs = _pair_sums(_similarities(self._whole), _similarities(cut))
        return EmbeddingDamage(
            cosines(self._whole, cut).cpu().numpy(), pairs.nan_to_num().cpu().numpy()
        )


def _similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """The cosine of each pair of texts, ``[texts, texts]``."""
    return cosines(embeddings[:, None], embeddings[None])  # type: ignore[no-any-return]


def _pair_sums(whole: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """What :class:`EmbeddingDamage` keeps of the pairs, from ``[texts, texts]``."""
    import torch

    others = 1 - torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
    sums = (others, whole, cut, whole * whole, cut * cut, whole * cut)
    return torch.stack([(each * others).sum(-1) for each in sums], -1)


class EmbeddingMeter(CutMeter[EmbeddingDamage]):
    """Holds cut models' embeddings of fixed texts against the whole one's.

    Args:
        model: A transformers model of text, in eval mode; a language head is not run.
        input_ids: ``[samples, tokens]``, int64; a sample is a text.
        mask: ``[samples, tokens]``, boolean; False marks padding.
        batch_size: Texts in one forward pass; pairs are compared within one, so it has
            :data:`TEXTS_TOGETHER` at least.
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
        pooling = pooling_of_model(model)
        batches = batches_of(input_ids, mask, max(batch_size, TEXTS_TOGETHER))
        asked = [_Embedded(each.trimmed(), pooling) for each in batches]
        super().__init__(model, asked, kept_bytes=kept_bytes, within=within, runs="states")


AnyMeter = DamageMeter | ClassMeter | EmbeddingMeter


def meter_of(
    model: Any,
    input_ids: NDArray[np.int64],
    mask: NDArray[np.bool_],
    *,
    batch_size: int = 4,
    positions: int = 1,
    embeds: bool | None = None,
    within: Within | None = None,
    sources: Sources | None = None,
    types: NDArray[np.int64] | None = None,
) -> AnyMeter:
    """What measures damage to a model's answers: its distributions, or its embeddings.

    Args:
        model: A transformers model of text, in eval mode.
        input_ids: ``[samples, tokens]``, int64.
        mask: ``[samples, tokens]``, boolean; False marks padding.
        batch_size: Samples in one forward pass.
        positions: Distributions are compared at every so many positions.
        embeds: Whether embeddings count; None: where the model has neither next tokens nor classes.
        within: See :class:`~exporter.models.ablation.meter.CutMeter`.
        sources: Of an encoder-decoder what its encoder reads; or images.
        types: Of pairs, of which text each token is, ``[samples, tokens]``.
    """
    judged = judged_by(model)
    if judged == "embeddings" if embeds is None else embeds:
        return EmbeddingMeter(model, input_ids, mask, batch_size=batch_size, within=within)
    if judged == "classes":
        return ClassMeter(
            model,
            input_ids,
            mask,
            batch_size=batch_size,
            within=within,
            types=types,
            sources=sources,
        )
    return DamageMeter(
        model,
        input_ids,
        mask,
        batch_size=batch_size,
        positions=positions,
        within=within,
        sources=sources,
    )


def meter_here(
    loaded: LoadedModel,
    text: CalibrationText,
    batch_size: int = 4,
    positions: int = POSITIONS,
    embeds: bool | None = None,
) -> AnyMeter:
    """Measures in this process, on all of a text; see :func:`meter_of`."""
    return meter_of(
        loaded.model,
        text.input_ids,
        text.mask,
        batch_size=batch_size,
        positions=positions,
        embeds=embeds,
        sources=text.sources,
        types=text.types,
    )


@dataclass(frozen=True, eq=False)
class _Embedded(OfBatch):
    """The embeddings of a batch of texts."""

    pooling: Pooling

    def places(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = self.batch.mask_on(hidden.device)
        embeddings: torch.Tensor = self.pooling(hidden.float(), mask)
        return embeddings

    def reference(self, answers: torch.Tensor) -> EmbeddingReference:
        return EmbeddingReference(answers)
