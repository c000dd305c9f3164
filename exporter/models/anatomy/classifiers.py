"""Runs classifiers, some of which answer at the last token of a text that isn't padding."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from exporter.models.anatomy.residual_stream import in_own_dtype

if TYPE_CHECKING:
    import torch


REGRESSION = "regression"


def classifies_texts(model: Any) -> bool:
    """Whether a model gives each text a class or a score, not each token."""
    return type(model).__name__.endswith("ForSequenceClassification")


def scores_pairs(model: Any) -> bool:
    """Whether a model is a reranker: its single logit scores a query with its passage.

    A ``problem_type`` of regression is what transformers' trainer writes for scores of any texts.
    """
    config = model.config
    classes = config.num_labels if classifies_texts(model) else None
    return ranks_pairs(classes, getattr(config, "problem_type", None))


def classes_of_texts(logits: Sequence[int | str | None] | None) -> int | str | None:
    """How many classes a graph gives each text, by its logits' shape; None where none, or tokens.

    Args:
        logits: As the graph tells it, ``[texts, classes]`` or ``[texts, tokens, classes]``; None
            for a graph without logits.
    """
    return logits[-1] if logits is not None and len(logits) == len(("texts", "classes")) else None


def ranks_pairs(classes: int | str | None, problem_type: str | None) -> bool:
    """:func:`scores_pairs` by the classes of a text and the ``problem_type`` of ``config.json``."""
    return classes == 1 and problem_type != REGRESSION


def has_single_logit(model: Any) -> bool:
    """Whether a model gives each text one number, by which two texts have an order."""
    return classifies_texts(model) and model.config.num_labels == 1


def class_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Runs a classifier on texts that are padded at the end; each gets the logits it has alone.

    Transformers' decoders find a text's last token by ``config.pad_token_id``. So padding gets that
    id here; a config without one gets an id that no text ends with while the model runs.

    Args:
        model: A transformers model with a head for classes.
        inputs: ``input_ids`` and ``attention_mask``, ``[batch, tokens]``; or images alone.

    Returns:
        Logits, ``[batch, classes]`` or ``[batch, tokens, classes]``.
    """
    if "input_ids" not in inputs:
        logits: torch.Tensor = model(**in_own_dtype(model, inputs)).logits
        return logits
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    config = model.config.get_text_config()
    with _padding_known(config, ids, mask) as padding:
        given = {**inputs, "input_ids": ids.masked_fill(mask == 0, padding)}
        found: torch.Tensor = model(**given).logits
    return found


@contextlib.contextmanager
def _padding_known(config: Any, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[int]:
    """The id of padding; the config has it while the block runs."""
    own = config.pad_token_id
    if own is not None and 0 <= own < config.vocab_size:
        yield own
        return
    lengths = mask.long().sum(-1, keepdim=True)
    last = set(ids.gather(1, lengths - 1).flatten().tolist())
    config.pad_token_id = next(each for each in itertools.count() if each not in last)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = own
