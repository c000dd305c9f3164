"""What took the places of what was dropped, what it cost, and what it gained in two domains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from exporter.artifacts import ComparisonReport, HealedBranch, HealedText, Healing
from exporter.printable import counted
from exporter.report.parts.part import Block, Cell, Grid, Note, Part
from exporter.report.words import significant

HEADER = ("text", "figure", "whole", "dropped", "healed", "taken back")
_ROLES = {"calibration": "held out of what was fitted on", "other": "another domain"}


def healing_part(report: ComparisonReport) -> Part | None:
    """The gain by text, and every branch's fit, or that they aren't known; None for a bare plan."""
    healing = report.healing
    if healing is None:
        return _unknown(report)
    return Part("healing", "Healing", [*_blocks(healing)])


def _unknown(report: ComparisonReport) -> Part | None:
    """For replacements of which nobody told how they came about."""
    replaced = sum(deletion.replacement != "none" for deletion in report.plan)
    if not replaced:
        return None
    told = (
        f"Replaced: {replaced} of {counted(len(report.plan), 'deletion')}. How that was fitted, "
        "and what it gained before the export, is not known: no report of it was beside the plan."
    )
    return Part("healing", "Healing", [Note(told)])


def healing_words(healing: Healing) -> str:
    """What was put in, in one sentence: ``8 replaced (7 linear, 1 bias), 2.9 million numbers``."""
    counts = Counter(branch.replacement for branch in healing.branches)
    bare = counts.pop("none", 0)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), reverse=True))
    left = f", {bare} left without" if bare else ""
    parts = f" ({told})" if told else ""
    return f"{counts.total()} replaced{parts}{left}; {healing.parameters:,} numbers added"


def healing_rows(healing: Healing) -> list[list[str]]:
    """For each text perplexity, KL divergence and agreement; as :data:`HEADER` has it."""
    return [row for text in healing.texts for row in _rows(text)]


def _rows(text: HealedText) -> Iterator[list[str]]:
    before, after, share = text.dropped, text.healed, text.gained_share
    gain = f"{text.gain:+.3f} nats"
    if text.gain_std_error is not None:
        gain += f" ± {text.gain_std_error:.3f}"
    if share is not None:
        gain += f" ({100 * share:.0f} %)"
    yield [
        f"{text.text.source}, {_ROLES[text.role]}",
        "perplexity",
        *(significant(one, 4) for one in (text.baseline_perplexity, before.perplexity)),
        significant(after.perplexity, 4),
        gain,
    ]
    yield ["", "KL, nats", "0", _told(before.kl, before.kl_std_error),
           _told(after.kl, after.kl_std_error), f"{before.kl - after.kl:+.3f} nats"]  # fmt: skip
    one, two = before.top1_agreement, after.top1_agreement
    yield ["", "same top-1", "100 %", f"{100 * one:.1f} %", f"{100 * two:.1f} %",
           f"{100 * (two - one):+.1f} points"]  # fmt: skip


def _told(value: float, std_error: float | None) -> str:
    told = significant(value, 3)
    return told if std_error is None else f"{told} ± {significant(std_error, 2)}"


def _blocks(healing: Healing) -> Iterator[Block]:
    for warning in healing.warnings:
        yield Note(warning, lead="Warning:")
    yield Note(f"{healing_words(healing)}. {_method(healing)}")
    if healing.texts:
        caption = "What dropping cost and what healing took back, in PyTorch"
        yield Grid(
            caption, list(HEADER), [[*row] for row in healing_rows(healing)], right=(2, 3, 4)
        )
        yield Note(
            "Taken back: of the log-perplexity that was lost, mean ± standard error over samples. "
            "No sample that was fitted on is judged on."
        )
    rows: list[list[Cell]] = [[*_branch(branch)] for branch in healing.branches]
    header = ["branch", "replacement", "numbers", "mean explains", "linear explains"]
    yield Grid("Each branch's fit, on held-out tokens", header, rows, right=(2, 3, 4))


def _method(healing: Healing) -> str:
    texts = "; ".join(f"{ref.source}, {ref.tokens:,} tokens" for ref in healing.calibration)
    how = "one on the other" if healing.sequential else "each alone"
    rank = "" if healing.rank is None else f", of rank {healing.rank}"
    return f"Asked for: {healing.asked}{rank}. Fitted {how} on {texts}."


def _branch(branch: HealedBranch) -> Iterator[str]:
    yield f"{branch.kind} {branch.layer}"
    yield branch.replacement
    yield f"{branch.parameters:,}"
    for share in (branch.bias_explained, branch.linear_explained):
        yield "-" if share is None else f"{100 * share:.1f} %"
