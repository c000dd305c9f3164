"""Measures what cuts do to the embeddings of texts: a model without next tokens has no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.models.ablation.damage import ClassDamage, EmbeddingDamage, Floats
from exporter.models.ablation.meter import (
    KEPT_BYTES,
    CutMeter,
    DamageMeter,
    OfBatch,
    Within,
    judged_by,
)
from exporter.models.model_folder import OF_IMAGES
from exporter.models.sentence_folder import Pooling, pooling_of_model
from exporter.models.texts.samples import Sources, batches_of

if TYPE_CHECKING:
    import torch

    from exporter.models.loading.model_source import LoadedModel
    from exporter.models.texts.calibration import CalibrationText

_OF_WHOLES = ("ForSequenceClassification", OF_IMAGES)
MULTI_LABEL = "multi_label_classification"
_OF_TEXTS = 2  # the rank of logits of one distribution for each text
TWO_TEXTS = 2
"""Of which a batch has one or several, as a reranker orders each two."""


def classifies_tokens(model: Any) -> bool:
    """Whether a classifier gives each token a class, not each text."""
    return type(model).__name__.endswith("ForTokenClassification")


def has_separate_labels(model: Any) -> bool:
    """Whether a classifier answers yes or no for each of its labels, which don't exclude others."""
    value = getattr(model.config, "problem_type", None)
    return value == MULTI_LABEL and type(model).__name__.endswith(_OF_WHOLES)


def by_position(
    logits: torch.Tensor, mask: torch.Tensor, *, separate: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions that can be compared, and which of them count.

    A text that gets a class has one position, of separate labels one each. A single logit, by which
    rerankers order texts, says nothing by itself: each two texts of a batch have one position, that
    of the first, for which of them stands higher; the last of an odd number is held against the
    first. A text alone has a yes against a logit of 0.

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

    logits: `[batch, classes]`, or `[batch, tokens, classes]`.
    mask: `[batch, tokens]`, boolean; False marks padding.
    """

    def __init__(self, logits: torch.Tensor, mask: torch.Tensor, *, separate: bool = False) -> None:
        self._tokens, self._separate = mask, separate
        result, self._mask = by_position(logits.double(), mask, separate=separate)
        self._log_p = result.log_softmax(-1)

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
        result, _ = by_position(logits.double(), self._tokens, separate=self._separate)
        log_q = result.log_softmax(-1)
        kl = (self._log_p.exp() * (self._log_p - log_q)).sum(-1)
        same = log_q.argmax(-1) == self._log_p.argmax(-1)
        return ClassDamage(
            *(
                (values.double() * self._mask).sum(-1).cpu().numpy()
                for values in (self._mask, kl.where(self._mask, 0.0), same)
            )
        )


class ClassMeter(CutMeter[ClassDamage]):
    """Holds cut models' classes of fixed texts against the whole one's."""

    def __init__(
        self,
        model: Any,
        input_ids: NDArray[np.int64],  # `[samples, tokens]`, int64; a sample is a text
        mask: NDArray[np.bool_],  # `[samples, tokens]`, boolean; False marks padding
        *,
        batch_size: int = 4,  # two at least, which rerankers are to order
        kept_bytes: int = KEPT_BYTES,
        within: Within | None = None,
        # `[samples, tokens]`, of which text of a pair each token is
        types: NDArray[np.int64] | None = None,
        sources: Sources | None = None,
    ) -> None:
        separate, size = has_separate_labels(model), max(batch_size, TWO_TEXTS)
        result = batches_of(input_ids, mask, size + size % TWO_TEXTS, sources, types)
        batches = (batch.trimmed() for batch in result)
        classified = [_Classified(batch, separate) for batch in batches]
        super().__init__(model, classified, kept_bytes=kept_bytes, within=within, runs="all")


@dataclass(frozen=True, eq=False)
class _Classified(OfBatch):
    """The classes of a batch of texts."""

    separate: bool

    def reference(self, answers: torch.Tensor) -> ClassReference:
        mask = self.batch.mask_on(answers.device)
        return ClassReference(answers, mask, separate=self.separate)


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

    embeddings: `[batch, hidden]`.
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
        alike: Floats = cosines(self._whole, cut).cpu().numpy()
        return EmbeddingDamage(alike, pairs.nan_to_num().cpu().numpy(), np.ones_like(alike))


def _similarities(embeddings: torch.Tensor) -> torch.Tensor:
    """The cosine of each pair of texts, ``[texts, texts]``."""
    return cosines(embeddings[:, None], embeddings[None])  # type: ignore[no-any-return]


def _pair_sums(whole: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """What :class:`EmbeddingDamage` keeps of the pairs, from ``[texts, texts]``."""
    import torch

    others = 1 - torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
    sums = (others, whole, cut, whole * whole, cut * cut, whole * cut)
    return torch.stack([(item * others).sum(-1) for item in sums], -1)


class EmbeddingMeter(CutMeter[EmbeddingDamage]):
    """Holds cut models' embeddings of fixed texts against the whole one's."""

    def __init__(
        self,
        model: Any,
        input_ids: NDArray[np.int64],  # `[samples, tokens]`, int64; a sample is a text
        mask: NDArray[np.bool_],  # `[samples, tokens]`, boolean; False marks padding
        *,
        batch_size: int = 4,  # pairs are compared within one, so it has TEXTS_TOGETHER at least
        kept_bytes: int = KEPT_BYTES,
        within: Within | None = None,
    ) -> None:
        pooling = pooling_of_model(model)
        batches = batches_of(input_ids, mask, max(batch_size, TEXTS_TOGETHER))
        embedded = [_Embedded(batch.trimmed(), pooling) for batch in batches]
        super().__init__(model, embedded, kept_bytes=kept_bytes, within=within, runs="states")


AnyMeter = DamageMeter | ClassMeter | EmbeddingMeter


def meter_of(
    model: Any,
    input_ids: NDArray[np.int64],  # `[samples, tokens]`, int64
    mask: NDArray[np.bool_],  # `[samples, tokens]`, boolean; False marks padding
    *,
    batch_size: int = 4,
    positions: int = 1,
    embeds: bool | None = None,  # None: where the model has neither next tokens nor classes
    within: Within | None = None,
    sources: Sources | None = None,
    # of pairs, of which text each token is, `[samples, tokens]`
    types: NDArray[np.int64] | None = None,
) -> AnyMeter:
    """What measures damage to a model's answers: its distributions, or its embeddings."""
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
