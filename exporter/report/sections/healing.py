"""What took the places of what was dropped, what it cost, and what it gained in two domains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from exporter.artifacts import ComparisonReport, HealedText, Healing, Training
from exporter.artifacts.base import TEXTS, Nouns
from exporter.printable import counted, significant
from exporter.report.sections.blocks import Block, Grid, Note, Section
from exporter.report.words import read_by

_HEADER = ("figure", "whole", "dropped", "healed", "recovered")
_ROLES = {"calibration": "held out", "other": "another domain"}


def healing_section(report: ComparisonReport) -> Section | None:
    """The gain by text, or that it isn't known; None for a bare plan."""
    if report.healing is not None:
        return Section("healing", "Healing", [*healing_blocks(report.healing, read_by(report))])
    replaced = sum(deletion.replacement != "none" for deletion in report.plan)
    if not replaced:
        return None
    text = (
        f"Replaced: {replaced} of {counted(len(report.plan), 'deletion')}. How that was fitted, "
        "and what it gained before the export, is not known: no report of it was beside the plan."
    )
    return Section("healing", "Healing", [Note(text)])


def healing_words(healing: Healing, read: Nouns = TEXTS) -> str:
    """What was put in, in one sentence: ``8 replaced (7 linear, 1 bias), 2.9 million numbers``."""
    replaced = _replaced(healing)
    words = f"{replaced}; {healing.parameters:,} numbers added"
    if healing.changed_weights:
        beside = f", {replaced}" if _is_replaced(healing) else ""
        words = (
            f"{counted(healing.changed_weights, 'weight')} changed{beside}, "
            f"{healing.parameters:,} numbers added to the model"
        )
    held_out = healing.of_role("calibration")
    first = None if held_out is None else held_out.kind.figures[0]
    if held_out is not None and first is not None and first.higher_is_better:
        ends = held_out.figures[first.key]
        before, after = first.written(ends.dropped), first.written(ends.healed)
        words += f"; {first.row_name} on held-out {read.much} {before} before, {after} after"
    elif healing.training is not None:
        losses = [check.held_out_loss for check in healing.training.checks]
        words += f"; loss on held-out {read.much} {losses[0]:.3g} before, {min(losses):.3g} after"
    return words


def _replaced(healing: Healing) -> str:
    """``8 replaced (7 linear, 1 bias), 2 left without``."""
    counts = Counter(branch.replacement for branch in healing.branches)
    bare = counts.pop("none", 0)
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), reverse=True))
    left = f", {bare} left without" if bare else ""
    return f"{counts.total()} replaced{f' ({text})' if text else ''}{left}"


def _is_replaced(healing: Healing) -> bool:
    return any(branch.replacement != "none" for branch in healing.branches)


def healing_grid(healing: Healing, caption: str = "In PyTorch", read: Nouns = TEXTS) -> Grid:
    """For each text perplexity, KL and agreement, or the cosine: whole, dropped, healed."""
    rows = [row for measured in healing.texts for row in _rows(measured)]
    return Grid(caption, [read.much, *_HEADER], rows, right=(2, 3, 4))


def _rows(measured: HealedText) -> Iterator[list[str]]:
    """A row a figure; the first one's last cell is the gain, how sure it is, and its share."""
    name = f"{measured.text.source}, {_ROLES[measured.role]}"
    for figure in measured.kind.figures:
        if (value := measured.figures.get(figure.key)) is None:
            continue
        before, after = value.dropped, value.healed
        change = figure.gained(figure.loss(before) - figure.loss(after))
        if name:
            change = measured.gain_words
        cells = [
            figure.row(figure.unchanged),
            *(
                figure.row(item) + ("" if error is None else f" ± {significant(error, 2)}")
                for item, error in zip((before, after), value.std_errors, strict=True)
            ),
        ]
        if name and measured.perplexities is not None:
            cells = [*map(significant, measured.perplexities)]
        yield [name, figure.row_name, *cells, change]
        name = ""


def healing_blocks(healing: Healing, read: Nouns) -> Iterator[Block]:
    """What was put in, how, and what that gained."""
    for warning in healing.warnings:
        yield Note(warning, lead="Warning:")
    yield Note(f"{healing_words(healing, read)}. {_method(healing, read)}")
    if healing.texts:
        lost = healing.texts[0].kind.lost
        caption = "What dropping cost and what healing recovered, in PyTorch"
        yield healing_grid(healing, caption, read)
        yield Note(
            f"Recovered: the share of the lost {lost}, mean ± standard error over samples. "
            "None of these samples was used for fitting."
        )


def _method(healing: Healing, read: Nouns) -> str:
    texts = "; ".join(ref.describe(read) for ref in healing.calibration)
    if healing.training is not None:
        text = _training_words(healing, healing.training, read)
        return f"{text} {read.much.capitalize()}: {texts}."
    if healing.changed_weights:
        beside = ", replacements fitted beside them," if _is_replaced(healing) else ","
        return f"Folded by least squares into products of kept branches{beside} on {texts}."
    none = "; no kept weight could be folded into" if healing.asked == "fold" else ""
    return f"Asked for: {healing.asked}{none}. Fitted on {texts}."


def _training_words(healing: Healing, training: Training, read: Nouns) -> str:
    rank = f" of rank {healing.rank}" if healing.rank is not None else ""
    trained = "all weights" if training.train == "all" else f"adapters{rank}, merged at the end"
    fitted = "" if training.fitted_loss is None else ", beginning with a fit by least squares"
    return (
        f"The whole model taught the cut one its {_GOALS[training.loss]}: {trained}, "
        f"{training.trained_parameters / 1e6:,.1f} million numbers, {training.tokens:,} tokens in "
        f"{training.seconds / 60:,.1f} min{fitted}. {_ENDS[training.stopped_by].format(read.much)}"
    )


_GOALS = {
    "answers": "next-token distributions",
    "classes": "classes and hidden states",
    "embeddings": "embeddings and hidden states",
    "states": "hidden states",
}
_ENDS = {
    "tokens": "All tokens were used.",
    "time": "The time was used up.",
    "no_gain": "It ended early, as held-out {} gained no more.",
    "diverged": "It ended early, as the loss was no longer finite; the best state was kept.",
}
