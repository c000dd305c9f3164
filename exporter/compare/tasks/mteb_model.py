"""Runners as mteb's models: an encoder, and a cross-encoder for rerankers.

They have the methods of mteb's ``EncoderProtocol`` and ``CrossEncoderProtocol``, so that
``mteb.evaluate`` takes them without a class of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.compare.tasks.encoding import TaskEncoder, reranked
from exporter.models.ablation.damage import Floats
from exporter.optional import require

EXTRA = "mteb"
_REVISION = "local"
_DOCUMENTS = ("document", "passage", "corpus")
Vectors = NDArray[np.float32]
Batches = Iterable[Mapping[str, Any]]
"""As mteb's data loaders give them: in each the texts, by ``text``."""


class MtebModel:
    """What both kinds have.

    Args:
        encoder: Of an entered runner.
        name: What mteb calls it.
    """

    def __init__(self, encoder: TaskEncoder, name: str) -> None:
        self.encoder, self.name = encoder, name

    @property
    def mteb_model_meta(self) -> Any:
        """A name alone: mteb's is to look nothing up."""
        meta = require("mteb.models.model_meta", extra=EXTRA).ModelMeta
        return meta.create_empty({"name": f"depthcut/{self.name}", "revision": _REVISION})


class MtebEncoder(MtebModel):
    """An ``EncoderProtocol``; texts run one at a time."""

    def encode(
        self, inputs: Batches, *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> Vectors:
        """Embeddings as the model's folder makes them, ``[texts, size]``.

        Args:
            inputs: Batches of texts.
            task_metadata: The task's, whose name and type may have a prompt of the folder.
            prompt_type: ``query`` or ``document``, or None.
            **_: Where the texts are from, and how many would run at once.

        Raises:
            ComparisonError: The model embeds nothing, or an embedding isn't finite.
            BackendError: A run fails.
        """
        names = prompt_names(str(task_metadata.name), str(task_metadata.type), prompt_type)
        found = self.encoder.embed_with(names, _texts(inputs), unit_length=False)
        return found.astype(np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Floats:
        """Cosines of all with all, ``[first, second]``."""
        first, second = _unit(embeddings1), _unit(embeddings2)
        cosines: Floats = np.atleast_2d(first) @ np.atleast_2d(second).T
        return cosines

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Floats:
        """Cosines of each with its own, ``[texts]``."""
        cosines: Floats = (_unit(embeddings1) * _unit(embeddings2)).sum(axis=-1)
        return cosines


class MtebCrossEncoder(MtebModel):
    """A ``CrossEncoderProtocol``: a model that reads query and passage together."""

    def predict(self, inputs1: Batches, inputs2: Batches, **_: Any) -> Floats:
        """The logit of the yes of each pair, ``[pairs]``.

        Args:
            inputs1: The queries.
            inputs2: As many passages.
            **_: Where they are from, and how many would run at once.

        Raises:
            ComparisonError: The model is no reranker, or logits aren't finite.
            BackendError: A run fails.
        """
        pairs = zip(_texts(inputs1), _texts(inputs2), strict=True)
        return reranked(self.encoder, list(pairs))


def mteb_model(encoder: TaskEncoder, name: str) -> MtebModel:
    """What mteb is given of a runner."""
    return (MtebCrossEncoder if encoder.classifies else MtebEncoder)(encoder, name)


def prompt_names(task: str, kind: str, prompt_type: Any) -> list[str]:
    """The names under which a folder may have a prompt for a text, the most special first.

    Args:
        task: The task's name.
        kind: Its type, such as ``STS``.
        prompt_type: ``query`` or ``document``, or None.
    """
    told = str(getattr(prompt_type, "value", prompt_type)) if prompt_type is not None else ""
    sides = [*(_DOCUMENTS if told in _DOCUMENTS else [told])] if told else []
    special = [*(f"{task}-{side}" for side in sides), task]
    return [*special, *(f"{kind}-{side}" for side in sides), kind, *sides]


def _texts(inputs: Batches) -> list[str]:
    return [str(text) for batch in inputs for text in batch["text"]]


def _unit(embeddings: Any) -> Floats:
    values: Floats = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / np.where(lengths == 0, 1, lengths)
