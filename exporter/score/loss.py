"""Metrics of the model's answers and of its loss: what a sublayer does to the next token's odds.

A new one: a function from a :class:`~exporter.models.ablation.damage.Damage`, or from a branch's
output and the loss's gradient there, here, and a line in :mod:`exporter.score.registry`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from exporter.models.ablation.damage import Damage


def kl(damage: Damage) -> tuple[float, float | None]:
    """Mean over positions of ``KL(p || q)``, ``p`` of the whole model, ``q`` without the sublayer.

    Range 0 to infinity, nats; 0: no answer changes. Source: the metric of logits of arXiv
    2407.16286; as a search's fitness, arXiv 2410.14649. Where this differs: no text is judged by
    its labels, so any text will do; every second position is looked at (neighbours tell nearly the
    same, and the head costs a fifth of a small model's run); the layers below the skipped one are
    not run again. Cost: half a forward pass for each sublayer.

    Returns:
        The mean and its standard error over samples.
    """
    return damage.kl, damage.kl_std_error


def perplexity(damage: Damage) -> tuple[float, float | None]:
    """Mean over positions of ``NLL without the sublayer - NLL``: log of the ratio of perplexities.

    Range minus to plus infinity, nats; 0: as good without, so the sublayer is redundant; below 0
    the text is predicted better without it. Source: arXiv 2406.10594 (BlockPruner) and the
    perplexity score of Shortened LLaMA. Where this differs: the logarithm of the ratio instead of
    the perplexity itself, which ranks the same and has a standard error over samples. It judges by
    the text's own next words, so noise and domain weigh more than in :func:`kl`, whose runs it
    shares at no cost.

    Returns:
        The mean and its standard error over samples.
    """
    return damage.log_perplexity_increase, damage.log_perplexity_increase_std_error


def taylor(output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """``|sum over h of g_th f_th|``: how much the loss would change, to first order, without f.

    ``f`` is what the branch adds to the residual stream and ``g`` the gradient of the sample's
    summed negative log-likelihood there; for a block ``f`` is all that its layer adds, ``Y - X``.
    Range 0 to infinity, nats a token; 0: the loss does not hang on the branch.
    Source: gradient times activation, arXiv 1611.06440, equation 8; of layers, the Taylor score of
    Shortened LLaMA, arXiv 2402.02834. Where this differs: Shortened LLaMA multiplies gradients with
    weights and adds up a block's matrices; here the branch's output stands for all of them, so that
    norms and biases count and nothing has to be kept for weights. The size is taken at each token:
    summed with its sign over a text it is the derivative by the branch's own scale, which training
    has brought to nothing. On SmolLM2-135M (1536 tokens of WikiText-2) its rank correlation with kl
    is 0.90 for attentions and 0.76 for MLPs; with its sign 0.29 and -0.32; of sizes at each element
    instead 0.92 and 0.81. Cost: a pass forward and one back, a sample at a time.

    Args:
        output: ``f``, ``[batch, tokens, hidden]``.
        gradient: ``g``, of the same shape.

    Returns:
        ``[batch, tokens]``, float64.
    """
    import torch

    # Half precision would round the sums to its few digits.
    wide = torch.promote_types(output.dtype, torch.float32)
    sums: torch.Tensor = torch.linalg.vecdot(output.to(wide), gradient.to(wide)).double().abs()
    return sums
