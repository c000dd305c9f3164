"""What each paper says of itself, of models that are too large for this table."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One figure of a paper.

    Attributes:
        method: Whose.
        source: The paper's number at arXiv.
        model: Of the figure.
        cut: What went.
        figure: What is said of the result.
        where: In the paper; ``in LinearPatch`` where another paper measured it.
    """

    method: str
    source: str
    model: str
    cut: str
    figure: str
    where: str


PUBLISHED = (
    Published(
        "cosine", "2406.15786", "Llama-2-70B", "half of the attentions",
        "48.4 % faster, 2.4 % of the performance lost", "abstract",
    ),
    Published(
        "SLEB", "2402.09025", "Llama-3-8B", "7 of 32 blocks",
        "WikiText-2 perplexity 6.14 to 13.1; 76.1 % kept on questions", "tables of 2505.24680",
    ),
    Published(
        "Prune&Comp", "2507.18212", "Llama-3-8B", "5 of 32 blocks, by block influence",
        "93.19 % kept on questions, 4.01 % above the same without compensation", "abstract, v1",
    ),
    Published(
        "LinearPatch", "2505.24680", "Llama-3-8B", "5 of 32 blocks",
        "94.15 % kept on questions; 95.16 % with the matrix distilled", "abstract",
    ),
    Published(
        "ReplaceMe", "2505.02819", "Llama-2-7B", "a quarter of the blocks",
        "91.9 % kept by least squares, 93.1 % by the cosine", "table of the project's page",
    ),
    Published(
        "NBL", "2505.21077", "DeepSeek-R1-Distill-Llama-8B", "12 of 32 attentions",
        "32 % faster, less than 1 % of the accuracy lost", "abstract",
    ),
)  # fmt: skip
"""ShortGPT and BlockPruner name no single figure in their abstracts."""
