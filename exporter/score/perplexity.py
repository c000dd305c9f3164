"""How much worse the model predicts the text when a sublayer is skipped.

Formula: ``S = mean over positions of NLL without the sublayer - NLL of the whole model``, that is
the logarithm of the ratio of perplexities; both from logits ``[batch, positions, vocabulary]``.
Range minus to plus infinity, nats; 0: as good without, so the sublayer is redundant; below 0 the
text is predicted better without it.
Source: arXiv 2406.10594 (BlockPruner: the masked model's perplexity, attention and MLP) and the
perplexity score of Shortened LLaMA.
Where this differs: the logarithm of the ratio instead of the perplexity itself, which ranks the
same and has a standard error over samples, both models on the same tokens.
It judges by the text's own next words, so noise and domain weigh more than in
:mod:`exporter.score.kl`, whose runs it shares at no cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.score.metric import AnswerMetric

if TYPE_CHECKING:
    from exporter.models.ablation import Damage


def log_increase(damage: Damage) -> float:
    """Log of the ratio of perplexities."""
    return damage.log_perplexity_increase


def std_error(damage: Damage) -> float | None:
    """Its standard error over samples."""
    return damage.log_perplexity_increase_std_error


PERPLEXITY = AnswerMetric("perplexity", log_increase, std_error)
