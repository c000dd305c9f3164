"""The ways of dropping attentions or blocks that the healing benchmark holds side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Fitted = Literal["none", "bias", "linear", "fold"]
FITTED: tuple[Fitted, ...] = ("bias", "linear")


@dataclass(frozen=True)
class Row:
    """One way of dropping attentions or blocks."""

    dropped: int
    fitted: Fitted
    sources: tuple[str, ...] = ()
    samples: int = 20
    rank: int | None = None
    compensation: float | None = None
    choice: Literal["cosine", "kl", "perplexity"] = "cosine"
    tasks: bool = False
    kind: Literal["attention", "block"] = "attention"

    @property
    def name(self) -> str:
        """Its name in the table, which is that of its kept result."""
        what = "blocks " if self.kind == "block" else ""
        parts = [f"{self.dropped} {what}{self.fitted}"]
        parts += [f"{'+'.join(self.sources)} x {self.samples}"] if self.sources else []
        parts += [f"rank {self.rank}"] if self.rank else []
        if self.compensation is not None:
            parts.append(f"sequential {self.compensation:g}")
        return ", ".join([*parts, *([f"by {self.choice}"] if self.choice != "cosine" else [])])


def rows(dropped: int) -> Iterator[Row]:
    """The table's, for so many dropped attentions."""
    yield Row(dropped, "none", tasks=True)
    for fitted in FITTED:
        yield Row(dropped, fitted, ("file",), 40, tasks=True)
        yield Row(dropped, fitted, ("file",), 40, choice="kl")
        yield Row(dropped, fitted, ("file",), 40, choice="perplexity", tasks=True)
        yield Row(dropped, fitted, ("self",), 60)
    yield Row(dropped, "bias", ("file",), 20, choice="perplexity")
    yield Row(dropped, "linear", ("self",), 60, choice="kl")
    for samples in (20, 120):
        yield Row(dropped, "linear", ("file",), samples)
        yield Row(dropped, "linear", ("self",), samples)
    for compensation in (0.0, 1.0):
        yield Row(dropped, "linear", ("file",), 40, compensation=compensation)
        yield Row(dropped, "linear", ("self",), 60, compensation=compensation)
    yield Row(dropped, "linear", ("file", "self"), 40)
    yield Row(dropped, "linear", ("file", "self", "pydoc"), 40)
    yield Row(dropped, "linear", ("pydoc",), 40)
    for rank in (32, 128):
        yield Row(dropped, "linear", ("file",), 40, rank)
    for samples in (20, 40):
        yield Row(dropped, "fold", ("file",), samples)
    yield Row(dropped, "fold", ("file", "pydoc"), 40)


def block_rows(dropped: int) -> Iterator[Row]:
    """The table's, for so many dropped blocks."""
    yield Row(dropped, "none", kind="block", tasks=True)
    yield Row(dropped, "linear", ("file",), 40, kind="block")
    for samples in (20, 40):
        yield Row(dropped, "fold", ("file",), samples, kind="block")
    yield Row(dropped, "fold", ("file", "pydoc"), 40, kind="block")
