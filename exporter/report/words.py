"""Numbers, shapes and sublayers in words, the same in every report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from exporter.artifacts import (
    FEWEST_ROUNDS,
    Arm,
    ComparisonReport,
    Interval,
    LatencyRow,
    PlannedDeletion,
)
from exporter.artifacts.base import IMAGES, RECORDINGS, TEXTS, Nouns
from exporter.printable import relative_change

T = TypeVar("T")


class KindWords(NamedTuple):
    """What a kind of sublayer is called."""

    one: str
    several: str
    short: str


KINDS: dict[str, KindWords] = {
    "attention": KindWords("attention", "attentions", "attn"),
    "cross_attention": KindWords("cross-attention", "cross-attentions", "cross"),
    "mixer": KindWords("mixer", "mixers", "mixer"),
    "mlp": KindWords("MLP", "MLPs", "MLP"),
    "block": KindWords("block", "blocks", "block"),
}
"""In the order in which a layer runs them; a block is all of a layer's."""

_GENERATION = {
    "first_token": "first token",
    "per_token": "each later token of {new}",
    "generate": "generation of {new} tokens",
}


def kinds_and_layers(plan: Iterable[PlannedDeletion]) -> dict[str, list[str]]:
    """The dropped layers by kind, each with what takes its place: ``7 (linear)``."""
    kinds, names = list(KINDS), dict[str, list[str]]()
    for deletion in sorted(plan, key=lambda d: (kinds.index(d.kind), d.layer)):
        place = "" if deletion.replacement == "none" else f" ({deletion.replacement})"
        names.setdefault(deletion.kind, []).append(f"{deletion.layer}{place}")
    return names


def counted_kind(kind: str, number: int) -> str:
    """``1 MLP``, ``8 attentions``."""
    return f"{number} {KINDS[kind].one if number == 1 else KINDS[kind].several}"


def dropped_lines(plan: Sequence[PlannedDeletion]) -> list[str]:
    """One line a kind: which layers, and what took their place."""
    return [
        f"{counted_kind(kind, len(layers))}: layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
        for kind, layers in kinds_and_layers(plan).items()
    ]


def dropped_briefly(plan: Sequence[PlannedDeletion]) -> str:
    """``attention 7, 3; MLP 2``, in the order of choice."""
    kinds: dict[str, list[str]] = {}
    for deletion in plan:
        kinds.setdefault(deletion.kind, []).append(str(deletion.layer))
    return "; ".join(f"{KINDS[kind].one} {', '.join(layers)}" for kind, layers in kinds.items())


def read_by(report: ComparisonReport) -> Nouns:
    """What the models of a report read, as far as it tells."""
    if report.accuracy is not None and report.accuracy.compared == "images":
        return IMAGES
    timed = {row.counts for row in report.latency}
    return next((nouns for nouns in (IMAGES, RECORDINGS) if nouns.parts in timed), TEXTS)


def shape_words(row: LatencyRow) -> str:
    """What was timed: ``prefill of 512 tokens``, ``decode after 512 tokens``."""
    batch = f", batch {row.batch}" if row.batch > 1 else ""
    if row.phase in _GENERATION:
        what = _GENERATION[row.phase].format(new=row.new_tokens)
        return f"{what} after a prompt of {row.sequence_length}{batch}"
    if row.phase == "decode":
        return f"decode after {row.past_length} tokens{batch}"
    if row.counts == RECORDINGS.parts:
        return f"{row.phase} of a {RECORDINGS.one}{batch}"  # all have one length
    return f"{row.phase} of {row.sequence_length} {row.counts}{batch}"


def has_too_few_rounds(row: LatencyRow) -> bool:
    """Whether a row was timed in too few rounds for its interval to be one of 95 %."""
    return row.rounds < FEWEST_ROUNDS


def short_shape(row: LatencyRow) -> str:
    """The same for a narrow column: ``prefill 512``, ``decode at 512``."""
    batch = f" x {row.batch}" if row.batch > 1 else ""
    if row.phase in _GENERATION:
        name = row.phase.replace("_", " ")
        return f"{name} {row.sequence_length}+{row.new_tokens}{batch}"
    if row.phase == "decode":
        return f"decode at {row.past_length}{batch}"
    if row.counts == RECORDINGS.parts:
        return f"{row.phase} {RECORDINGS.one}{batch}"
    return f"{row.phase} {row.sequence_length}{batch}"


def speedup_words(ratio: float, ci95: tuple[float, float], *, digits: int = 3) -> str:
    """The ratio with its interval: ``1.130x [1.101, 1.153]``."""
    low, high = (f"{bound:.{digits}f}" for bound in ci95)
    return f"{ratio:.{digits}f}x [{low}, {high}]"


def speedup_range(ratios: Iterable[float]) -> str:
    """From the least to the greatest ratio: ``1.09 to 1.11``."""
    names = sorted({f"{ratio:.2f}" for ratio in ratios}, key=float)
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def change_words(before: float, after: float, log_change: Interval | None) -> str:
    """``+10.8 % [+9.5, +12.3]``, by the interval of the logarithm's change."""
    bounds = () if log_change is None else (math.expm1(min(b, 50.0)) for b in log_change.ci95)
    interval = ", ".join(f"{100 * bound:+.1f}" for bound in bounds)
    return relative_change(before, after) + (interval and f" [{interval}]")


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def or_dash(value: T | None, words: Callable[[T], str]) -> str:
    """A value in words, or that there is none."""
    return "-" if value is None else words(value)


def named_arms(report: ComparisonReport) -> dict[str, Arm]:
    """Both arms and the references, by name."""
    arms = report.arms
    return {"baseline": arms.baseline, "candidate": arms.candidate, **arms.references}


def weights_words(arm: Arm) -> str:
    """How an arm's weights are kept: its precision, or how they were quantised."""
    return arm.precision if arm.quantization is None else arm.quantization.name
