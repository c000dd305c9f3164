"""What each paper says of itself, of models that are too large for this table."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One figure of a paper."""

    method: str
    source: str
    model: str
    cut: str
    figure: str
    where: str


PUBLISHED = (
    Published(
        "cosine", "2406.15786", "Llama-2-70B", "half of the attentions",
        "48.4 % faster; 2.4 points of 73.9 lost on questions", "v6, table of Llama-2-70B",
    ),
    Published(
        "ShortGPT", "2403.03853", "Llama-2-13B", "10 of 40 blocks",
        "55.0 to 52.2 % right of MMLU", "v3, introduction",
    ),
    Published(
        "SLEB", "2402.09025", "Llama-2-70B", "a fifth of the blocks",
        "C4 perplexity 5.71 to 7.31; 1.27 times the tokens a second", "v5, table 1",
    ),
    Published(
        "BlockPruner", "2406.10594", "Llama-2-7B", "22 % of the weights",
        "69.0 to 60.2 % right on five tasks; perplexity 11.5", "table of main results",
    ),
    Published(
        "Prune&Comp", "2507.18212", "Llama-3-8B", "5 of 32 blocks, by block influence",
        "93.19 % kept on questions, 4.01 % above the same without compensation", "v1, abstract",
    ),
    Published(
        "LinearPatch", "2505.24680", "Llama-3-8B", "5 of 32 blocks",
        "94.15 % kept on questions; 95.16 % with the matrix distilled", "abstract",
    ),
    Published(
        "ReplaceMe", "2505.02819", "Llama-2-7B", "a quarter of the blocks",
        "91.9 % kept by least squares, 93.1 % by the cosine", "table of the authors' repository",
    ),
    Published(
        "NBL", "2505.21077", "DeepSeek-R1-Distill-Llama-8B", "12 of 32 attentions",
        "32 % faster, less than 1 % of the accuracy lost", "abstract",
    ),
)  # fmt: skip
