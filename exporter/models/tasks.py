"""What a model answers with: how it is asked, held against the whole model, judged and taught.

A new kind of answers is a subclass of :class:`Task`, and its place in :data:`TASKS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.errors import ScoringError
from exporter.models.ablation.damage import (
    BySample,
    ClassDamage,
    D,
    Damage,
    EmbeddingDamage,
    Floats,
    Objective,
    Reference,
)
from exporter.models.ablation.meter import KEPT_BYTES, Answers, CutMeter, Within
from exporter.models.ablation.streams import Runs
from exporter.models.model_folder import CLASSIFIERS, OF_IMAGES
from exporter.models.residual_stream import class_logits
from exporter.models.sentence_folder import Pooling, pooling_of_model
from exporter.models.texts.samples import Batch, Sources, batches_of

if TYPE_CHECKING:
    import torch

    from exporter.models.loading.model_source import LoadedModel
    from exporter.models.texts.calibration import CalibrationText

POSITIONS = 2
"""Searches compare answers at every second position: the head costs a third of a small model."""


class Task(ABC, Generic[D]):
    """What a model answers with."""

    learns: ClassVar[Literal["answers", "classes", "embeddings"]]  # what a training's loss is of
    runs: ClassVar[Runs]  # what of the model runs
    objectives: ClassVar[tuple[Objective, ...]]  # what a search may keep small, the usual one first
    damage: ClassVar[type[BySample]]  # what a cut costs; limits can be on its kind's figures
    foretells: ClassVar[bool] = False  # whether what is judged at a token is the next one
    passages: ClassVar[bool] = True  # whether texts are read as wholes, such as paragraphs
    # that a training reads, where nobody says how many: what it learns of a text is one vector
    trained_tokens: ClassVar[int] = 600_000
    # so many times as high a rate as for tokens, at most: all-MiniLM-L6-v2 learned faster so
    fastest: ClassVar[float] = 2.0
    # how much the layers' states count in a training: an embedding alone is little to learn from
    states_weight: ClassVar[float] = 1.0

    def __init__(self, model: Any) -> None:
        self.model = model

    @staticmethod
    @abstractmethod
    def fits(model: Any) -> bool:
        """Whether a model answers so, unless one before it in :data:`TASKS` fits, too."""

    def batch_size(self, size: int) -> int:
        """As many samples as are asked in one run at least, where so many are wanted."""
        return size

    def places(self, hidden: torch.Tensor, batch: Batch, positions: int) -> torch.Tensor:
        """The hidden states that the head is run on, or what is asked of a model without it.

        Next tokens are judged at every so many positions.
        """
        return hidden

    @abstractmethod
    def reference(self, answers: torch.Tensor, batch: Batch, positions: int) -> Answers[D]:
        """The whole model's answers to a batch, as what cut ones are held against."""

    def refuse_unmeasurable(self, mask: NDArray[np.bool_], positions: int) -> None:
        """Refuses what damage can't be measured on; mask: `[samples, tokens]`."""
        counted = mask[:, 1:] & mask[:, :-1] if self.foretells else mask
        if not counted[:, ::positions].any():
            raise ScoringError(
                "There is no token to judge by, or none with a next one to predict.",
                "Give longer samples.",
                code="no-tokens",
            )

    def meter(
        self,
        input_ids: NDArray[np.int64],  # `[samples, tokens]`
        mask: NDArray[np.bool_],  # `[samples, tokens]`; False marks padding
        *,
        batch_size: int = 4,
        positions: int = 1,
        kept_bytes: int = KEPT_BYTES,
        within: Within | None = None,
        sources: Sources | None = None,
        # of pairs, of which text each token is, `[samples, tokens]`
        types: NDArray[np.int64] | None = None,
    ) -> CutMeter[D]:
        """What measures damage to the model's answers to fixed samples."""
        self.refuse_unmeasurable(mask, positions)
        batches = batches_of(input_ids, mask, self.batch_size(batch_size), sources, types)
        if self.passages:
            batches = [batch.trimmed() for batch in batches]
        return CutMeter(self, batches, positions, kept_bytes=kept_bytes, within=within)

    @property
    def answers_a_text(self) -> int:
        """How many answers each text gets that a share of equal ones is counted over; 0: none."""
        return 0

    @abstractmethod
    def given(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What a student gives that learns such answers."""

    @abstractmethod
    def loss(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """How far what a student gives is from what the whole model gives.

        mask: `[batch, tokens]`, boolean; False marks padding.
        """

    def loss_words(self, loss: float) -> str:
        """A loss on held-out text, in words."""
        return f"held-out loss {loss:.4f}"

    def nearness(self, loss: float, answers: Callable[[], list[torch.Tensor]]) -> float | None:
        """How near a student is to the whole model, as a divergence; None: that says nothing.

        answers: gives the whole model's, for tasks that want to know how they spread.
        """
        return loss

    def weight(self, mask: NDArray[np.bool_]) -> float:
        """How much the loss on some samples counts among others; mask: `[samples, tokens]`."""
        return float(len(mask))

    @property
    def multiplied(self) -> int:
        """The parameters that a token is multiplied with: all but an embedding, if there is one."""
        count: int = self.model.num_parameters()
        table = getattr(self.model.get_input_embeddings(), "weight", None)  # images have none
        return count if table is None else count - int(table.numel())


def task_of(model: Any) -> Task[Any]:
    """What a model is judged by."""
    return next(task(model) for task in TASKS if task.fits(model))


def meter_here(
    loaded: LoadedModel,
    text: CalibrationText,
    batch_size: int = 4,
    positions: int = POSITIONS,
    *,
    embeds: bool = False,
) -> CutMeter[Any]:
    """Measures in this process, on all of a text; ``embeds``: embeddings of whatever model."""
    task: Task[Any] = Embeddings(loaded.model) if embeds else task_of(loaded.model)
    return task.meter(
        text.input_ids,
        text.mask,
        batch_size=batch_size,
        positions=positions,
        sources=text.sources,
        types=text.types,
    )


# Next tokens


class Tokens(Task[Damage]):
    """Distributions of next tokens."""

    learns, runs, objectives = "answers", "language", ("kl", "perplexity")
    damage = Damage
    foretells, passages, states_weight = True, False, 0.0
    trained_tokens, fastest = 200_000, 1.0

    @staticmethod
    def fits(model: Any) -> bool:
        return bool(model.can_generate() and model.get_output_embeddings() is not None)

    def places(self, hidden: torch.Tensor, batch: Batch, positions: int) -> torch.Tensor:
        return hidden[:, ::positions]

    def reference(self, answers: torch.Tensor, batch: Batch, positions: int) -> Reference:
        import torch

        follows = np.zeros_like(batch.mask)
        follows[:, :-1] = batch.mask[:, :-1] & batch.mask[:, 1:]
        targets = np.roll(batch.ids, -1, axis=1)[:, ::positions]
        given = (torch.from_numpy(a.copy()) for a in (targets, follows[:, ::positions]))
        with torch.inference_mode():
            return Reference(answers, *(array.to(answers.device) for array in given))

    @classmethod
    def of(cls, model: Any) -> Tokens:
        """The task of a model whose damage is asked for as one to next tokens."""
        if not cls.fits(model):
            raise ScoringError(
                f"{type(model).__name__} predicts no next token, so damage to its answers, such as "
                "of its perplexity, can't be measured.",
                "Score by a metric of the residual stream, such as cosine; depthcut export finds "
                "the largest cut that keeps embeddings or classes.",
                code="no-next-token",
            )
        return cls(model)

    def given(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    def loss(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        from exporter.models.ablation.losses import answer_loss

        return answer_loss(student, teacher, mask)

    def weight(self, mask: NDArray[np.bool_]) -> float:
        return float(mask.sum())

    @property
    def multiplied(self) -> int:
        """The embedding counts for the head, which is as large."""
        return int(self.model.num_parameters())


# Classes of texts, of tokens or of images


MULTI_LABEL = "multi_label_classification"
_OF_WHOLES = ("ForSequenceClassification", OF_IMAGES)
_OF_TEXTS = 2  # the rank of logits of one distribution for each text
_TWO_TEXTS = 2  # are in a batch at least, as a reranker orders each two


class Classes(Task[ClassDamage]):
    """Distributions over classes; of a reranker the order of each two texts."""

    learns, runs, objectives = "classes", "all", ("kl",)
    damage = ClassDamage

    @staticmethod
    def fits(model: Any) -> bool:
        return type(model).__name__.endswith(CLASSIFIERS)

    @cached_property
    def of_tokens(self) -> bool:
        """Whether each token gets a class, not each text."""
        return type(self.model).__name__.endswith("ForTokenClassification")

    @cached_property
    def separate(self) -> bool:
        """Whether each label has a yes or no of its own, which doesn't exclude others."""
        value = getattr(self.model.config, "problem_type", None)
        return value == MULTI_LABEL and type(self.model).__name__.endswith(_OF_WHOLES)

    @property
    def answers_a_text(self) -> int:
        if self.of_tokens:
            return 0
        return int(self.model.config.num_labels) if self.separate else 1

    def batch_size(self, size: int) -> int:
        size = max(size, _TWO_TEXTS)
        return size + size % _TWO_TEXTS

    def reference(self, answers: torch.Tensor, batch: Batch, positions: int) -> ClassReference:
        return ClassReference(answers, batch.mask_on(answers.device), separate=self.separate)

    def given(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return class_logits(self.model, inputs)

    def loss(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """See :meth:`Task.loss`.

        Of a single logit, by which rerankers order, half the mean squared difference: of large
        logits a divergence would tell little.
        """
        from exporter.models.ablation.losses import answer_loss

        if teacher.shape[-1] == 1:
            differences = (student.float() - teacher.float())[..., 0]
            counted = differences[mask] if differences.shape == mask.shape else differences
            return counted.square().mean() / 2
        given, _ = by_position(student, mask, separate=self.separate)
        return answer_loss(given, *by_position(teacher, mask, separate=self.separate))

    def nearness(self, loss: float, answers: Callable[[], list[torch.Tensor]]) -> float:
        import torch

        logits = answers()
        if logits[0].shape[-1] > 1:
            return loss
        variance = float(torch.cat([item.flatten() for item in logits]).float().var(correction=0))
        return loss / variance if variance else loss

    def weight(self, mask: NDArray[np.bool_]) -> float:
        return float(mask.sum() if self.of_tokens else len(mask))


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


# Embeddings

TEXTS_TOGETHER = 16
"""That are embedded in one run at least, as each is compared with the others of it."""


class Embeddings(Task[EmbeddingDamage]):
    """One vector a text, and how similar texts are by it."""

    learns, runs, objectives = "embeddings", "states", ("cosine", "similarity")
    damage = EmbeddingDamage

    @staticmethod
    def fits(model: Any) -> bool:
        return hasattr(model, "base_model")

    @cached_property
    def pooling(self) -> Pooling:
        """What makes an embedding of a text's last hidden states."""
        return pooling_of_model(self.model)

    def batch_size(self, size: int) -> int:
        return max(size, TEXTS_TOGETHER)

    def places(self, hidden: torch.Tensor, batch: Batch, positions: int) -> torch.Tensor:
        embeddings: torch.Tensor = self.pooling(hidden.float(), batch.mask_on(hidden.device))
        return embeddings

    def reference(self, answers: torch.Tensor, batch: Batch, positions: int) -> EmbeddingReference:
        return EmbeddingReference(answers)

    def given(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        states: torch.Tensor = self.model.base_model(**inputs).last_hidden_state
        return states

    def loss(
        self, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """1 minus the mean cosine; of last hidden states, `[batch, tokens, hidden]`."""
        own, other = self.pooling(student.float(), mask), self.pooling(teacher.float(), mask)
        loss: torch.Tensor = 1 - cosines(other, own).mean()
        return loss

    def loss_words(self, loss: float) -> str:
        return f"held-out mean cosine {1 - loss:.4f}"

    def nearness(self, loss: float, answers: Callable[[], list[torch.Tensor]]) -> None:
        return None


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


TASKS: list[type[Task[Any]]] = [Tokens, Classes, Embeddings]
"""In the order in which they are asked whether they fit."""
