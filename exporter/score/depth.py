"""The deepest first: no text, no pass over the model.

Formula: ``S = layers above this one``, the same for attention, MLP and block.
Range 0 to layers - 1; 0: the last layer, which goes first.
Source: arXiv 2407.15516 (deepest attentions first, no metric); a baseline in arXiv 2406.15786v6
(Mistral-7B, 4, 8 and 12 attentions: 66.9, 66.9, 61.5 against the cosine's 67.0, 66.9, 64.8).
Where this differs: the last layer is not spared.
There are no samples, so there is no standard error.
"""

from __future__ import annotations

from exporter.score.metric import UNITS, FixedMetric


def layers_above(layers: int, _seed: int) -> list[list[float]]:
    """``values[layer][unit]``; the seed does not matter."""
    return [[float(layers - 1 - layer)] * len(UNITS) for layer in range(layers)]


DEPTH = FixedMetric("depth", layers_above)
