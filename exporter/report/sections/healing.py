"""What took the places of what was dropped, what it cost, and what it gained in two domains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from exporter.artifacts import ComparisonReport, HealedBranch, HealedText, Healing
from exporter.printable import counted
from exporter.report.sections.blocks import Block, Grid, Note, Section
from exporter.report.words import or_dash, percent, significant

_HEADER = ("text", "figure", "whole", "dropped", "healed", "taken back")
_ROLES = {"calibration": "held out of what was fitted on", "other": "another domain"}


def healing_section(report: ComparisonReport) -> Section | None:
    """The gain by text, and every branch's fit, or that they aren't known; None for a bare plan."""
    if report.healing is not None:
        return Section("healing", "Healing", [*_blocks(report.healing)])
    replaced = sum(deletion.replacement != "none" for deletion in report.plan)
    if not replaced:
        return None
    told = (
        f"Replaced: {replaced} of {counted(len(report.plan), 'deletion')}. How that was fitted, "
        "and what it gained before the export, is not known: no report of it was beside the plan."
    )
    return Section("healing", "Healing", [Note(told)])


def healing_words(healing: Healing) -> str:
    """What was put in, in one sentence: ``8 replaced (7 linear, 1 bias), 2.9 million numbers``."""
    counts = Counter(branch.replacement for branch in healing.branches)
    bare = counts.pop("none", 0)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), reverse=True))
    left = f", {bare} left without" if bare else ""
    parts = f" ({told})" if told else ""
    return f"{counts.total()} replaced{parts}{left}; {healing.parameters:,} numbers added"


def healing_grid(healing: Healing, caption: str = "In PyTorch") -> Grid:
    """For each text perplexity, KL divergence and agreement: whole, dropped, healed."""
    rows = [row for text in healing.texts for row in _rows(text)]
    return Grid(caption, _HEADER, rows, right=(2, 3, 4))


def _rows(text: HealedText) -> Iterator[list[str]]:
    before, after, share = text.dropped, text.healed, text.gained_share
    gain = f"{text.gain:+.3f} nats"
    if text.gain_std_error is not None:
        gain += f" ± {text.gain_std_error:.3f}"
    if share is not None:
        gain += f" ({100 * share:.0f} %)"
    perplexities = (text.baseline_perplexity, before.perplexity, after.perplexity)
    name = f"{text.text.source}, {_ROLES[text.role]}"
    yield [name, "perplexity", *map(significant, perplexities), gain]
    kls = (_with_error(one.kl, one.kl_std_error) for one in (before, after))
    yield ["", "KL, nats", "0", *kls, f"{before.kl - after.kl:+.3f} nats"]
    one, two = before.top1_agreement, after.top1_agreement
    change = f"{100 * (two - one):+.1f} points"
    yield ["", "same top-1", "100 %", percent(one), percent(two), change]


def _with_error(value: float, std_error: float | None) -> str:
    told = significant(value, 3)
    return told if std_error is None else f"{told} ± {significant(std_error, 2)}"


def _blocks(healing: Healing) -> Iterator[Block]:
    for warning in healing.warnings:
        yield Note(warning, lead="Warning:")
    yield Note(f"{healing_words(healing)}. {_method(healing)}")
    if healing.texts:
        yield healing_grid(healing, "What dropping cost and what healing took back, in PyTorch")
        yield Note(
            "Taken back: of the log-perplexity that was lost, mean ± standard error over samples. "
            "No sample that was fitted on is judged on."
        )
    header = ["branch", "replacement", "numbers", "mean explains", "linear explains"]
    rows = [_branch(branch) for branch in healing.branches]
    yield Grid("Each branch's fit, on held-out tokens", header, rows, right=(2, 3, 4))


def _method(healing: Healing) -> str:
    texts = "; ".join(f"{ref.source}, {ref.tokens:,} tokens" for ref in healing.calibration)
    how = "one on the other" if healing.sequential else "each alone"
    rank = "" if healing.rank is None else f", of rank {healing.rank}"
    return f"Asked for: {healing.asked}{rank}. Fitted {how} on {texts}."


def _branch(branch: HealedBranch) -> list[str]:
    explained = (branch.bias_explained, branch.linear_explained)
    shares = (or_dash(share, percent) for share in explained)
    return [
        f"{branch.kind} {branch.layer}", branch.replacement, f"{branch.parameters:,}", *shares,
    ]  # fmt: skip
