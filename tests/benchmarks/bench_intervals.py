"""How often 95 % intervals hold the truth on dependent text, of which the truth is known.

Run it with ``python -m tests.benchmarks.bench_intervals``: 2,000 texts for each row, two minutes.
A sample is a window of 512 tokens. Tokens follow one another (a first-order autoregression of 0.6
below their marginal distribution), windows have levels of their own, and a third of the levels'
variance is their documents'. ``log-perplexity``: differences of losses, with tails of Student's t
of four degrees. ``KL``: log-normal tokens around log-normal levels (0.5). ``share``: what healing
leaves of a cut's rise of log-perplexity, a ratio of two such sums.

Printed is, for one window a document and for three on average (of unequal number), the share of
intervals that hold the truth: by the library, clustered by document; and by the percentiles of a
bootstrap over windows, which is narrower. The target is 93 to 97 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from exporter.compare.intervals import mean_interval
from exporter.models.ablation.damage import Floats

QUANTITIES = ("log-perplexity", "KL", "share")
WINDOWS = (8, 16, 64)
_FOLLOWS, _OF_DOCUMENTS = 0.6, 0.3
_MEAN_KL, _LEVELS, _TOKENS = 0.15, 0.5, 1.3
_MEAN_RISE, _LEFT = 0.05, 0.4
_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Texts:
    """Many texts of as many windows: of each window a sum, its divisor, and its document."""

    sums: Floats
    divisors: Floats
    documents: NDArray[np.int64]
    truth: float
    positive: bool

    def __iter__(self) -> Iterator[tuple[Floats, Floats, NDArray[np.int64]]]:
        return zip(self.sums, self.divisors, self.documents, strict=True)


def dependent_texts(
    quantity: str, runs: int, windows: int, per_document: int, *, tokens: int = 512, seed: int = 0
) -> Texts:
    """Draws texts, see the module."""
    rng = np.random.default_rng(seed)
    documents = _documents(rng, runs, windows, per_document)
    of_documents = np.take_along_axis(rng.standard_normal((runs, windows)), documents, axis=1)
    own = rng.standard_normal((runs, windows))
    levels = np.sqrt(_OF_DOCUMENTS) * of_documents + np.sqrt(1 - _OF_DOCUMENTS) * own
    parts = range(0, runs, max(1, _AT_ONCE // (windows * tokens)))
    rows = [slice(start, start + parts.step) for start in parts]
    if quantity == "KL":
        floats = [_divergences(rng, levels[part], tokens) for part in rows]
        counts = np.full((runs, windows), float(tokens))
        return Texts(np.concatenate(floats), counts, documents, _MEAN_KL, positive=True)
    rises = np.concatenate([_rises(rng, levels[part], tokens) for part in rows])
    if quantity == "log-perplexity":
        counts = np.full((runs, windows), float(tokens))
        return Texts(rises, counts, documents, _MEAN_RISE, positive=False)
    bare = 4 * _MEAN_RISE * tokens + rises
    other = np.concatenate([_rises(rng, own[part], tokens) for part in rows])
    healed = _LEFT * bare + other - _MEAN_RISE * tokens
    return Texts(healed, bare, documents, _LEFT, positive=False)


def _documents(
    rng: np.random.Generator, runs: int, windows: int, per_document: int
) -> NDArray[np.int64]:
    """Of each window: all apart, or documents of unequal length, two at least."""
    if per_document == 1:
        return np.tile(np.arange(windows), (runs, 1))
    number = max(3, round(windows / per_document))
    lengths = rng.dirichlet(np.full(number, 3.0), runs)
    drawn = rng.random((runs, windows, 1)) > lengths.cumsum(axis=1)[:, None, :-1]
    documents = drawn.sum(axis=2)
    documents[:, :2] = [0, 1]
    return documents


def _tokens(rng: np.random.Generator, levels: Floats, tokens: int) -> Floats:
    """``[texts, windows, tokens]``, each normal, and like the one before."""
    fresh = rng.standard_normal((*levels.shape, tokens))
    floats: Floats = lfilter([np.sqrt(1 - _FOLLOWS**2)], [1, -_FOLLOWS], fresh, axis=2)
    return floats


def _divergences(rng: np.random.Generator, levels: Floats, tokens: int) -> Floats:
    logs = _LEVELS * levels[..., None] + _TOKENS * _tokens(rng, levels, tokens)
    mean = _MEAN_KL / np.exp((_LEVELS**2 + _TOKENS**2) / 2)
    sums: Floats = np.exp(logs).sum(axis=2) * mean
    return sums


def _rises(rng: np.random.Generator, levels: Floats, tokens: int) -> Floats:
    normal = _tokens(rng, levels, tokens)
    tails = np.sqrt(4 / rng.chisquare(4, normal.shape))
    rises: Floats = (_MEAN_RISE + 0.04 * levels[..., None] + 0.5 * normal * tails).sum(axis=2)
    return rises


def held(texts: Texts) -> float:
    """The share of texts whose interval by the library holds the truth."""
    intervals = [mean_interval(*text, positive=texts.positive) for text in texts]
    return float(
        np.mean(
            [
                interval and interval.ci95[0] <= texts.truth <= interval.ci95[1]
                for interval in intervals
            ]
        )
    )


def held_by_percentiles(texts: Texts, draws: int = 500) -> float:
    """The same by a bootstrap over windows."""
    rng, inside = np.random.default_rng(1), []
    for sums, divisors, _ in texts:
        rows = rng.integers(0, len(sums), (draws, len(sums)))
        low, high = np.quantile(sums[rows].sum(1) / divisors[rows].sum(1), (0.025, 0.975))
        inside.append(low <= texts.truth <= high)
    return float(np.mean(inside))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    runs = parser.parse_args().runs
    print(f"{'':<16} {'a document':>10} {'windows':>8} {'library':>8} {'percentiles':>12}")
    for quantity in QUANTITIES:
        for per_document in (1, 3):
            for windows in WINDOWS:
                texts = dependent_texts(quantity, runs, windows, per_document)
                shares = f"{held(texts):8.1%} {held_by_percentiles(texts):12.1%}"
                print(f"{quantity:<16} {per_document:10} {windows:8} {shares}", flush=True)


if __name__ == "__main__":
    main()
