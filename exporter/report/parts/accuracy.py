"""Accuracy on the evaluation text: perplexity, KL divergence, agreement, and which text it was."""

from __future__ import annotations

from collections.abc import Iterator

from exporter.artifacts import Accuracy, ComparisonReport, Interval, PositionError
from exporter.report.parts.part import Block, Grid, Note, Part
from exporter.report.words import HEADER, accuracy_rows, significant, why_no_accuracy


def accuracy_part(report: ComparisonReport) -> Part:
    """Perplexity and its like; a sentence where none was measured."""
    accuracy = report.accuracy
    if accuracy is None:
        note = Note(f"Not measured: {why_no_accuracy(report)}.")
        return Part("accuracy", "Accuracy", [note])
    rows = [row[:4] for row in accuracy_rows(report)]
    grid = Grid("Accuracy on the evaluation text", HEADER[:4], rows, right=(1, 2, 3))
    return Part("accuracy", "Accuracy", [grid, *_intervals(accuracy), *_texts(report, accuracy)])


def _intervals(accuracy: Accuracy) -> Iterator[Block]:
    found = (
        ("log perplexity, increase in nats", accuracy.log_perplexity_increase),
        ("KL divergence, nats", accuracy.kl_interval),
        ("same most likely token", accuracy.top1_interval),
    )
    rows = [[what, *interval_cells(value)] for what, value in found if value is not None]
    if rows:
        header = ["", "estimate", "95 % interval"]
        yield Grid("Intervals over samples, paired", header, rows, right=(1, 2))


def interval_cells(interval: Interval) -> tuple[str, str]:
    """The estimate, and its bounds in brackets."""
    low, high = (significant(bound, 3) for bound in interval.ci95)
    return significant(interval.value, 3), f"[{low}, {high}]"


def _texts(report: ComparisonReport, accuracy: Accuracy) -> Iterator[Block]:
    stride = "" if accuracy.stride is None else f", read with a stride of {accuracy.stride:,}"
    yield Note(
        f"Evaluation text: {accuracy.text_source}, {accuracy.tokens:,} tokens{stride} "
        f"(SHA-256 `{accuracy.text_sha256[:12]}`)."
    )
    if accuracy.perplexity is None:
        yield Note(
            "There is no perplexity: the tokens are no text, or the model doesn't predict the "
            "next token."
        )
    yield Note(_calibration(report))
    yield Note(
        "KL divergence is KL(baseline || candidate) of the next-token distributions, mean over "
        "positions; 0 means that nothing changed."
    )


def _calibration(report: ComparisonReport) -> str:
    text = report.calibration
    if text is None:
        return "Which text importance was measured on is not on record here."
    return (
        f"Importance was measured on another text: {text.source}, {text.samples} x "
        f"{text.sequence_length}, {text.tokens:,} tokens (SHA-256 `{text.sha256[:12]}`)."
    )


def positions_part(report: ComparisonReport) -> Part | None:
    """Where in the context the arms differ; None where it was not measured."""
    if report.accuracy is None or not report.accuracy.positions:
        return None
    header = ["positions", "KL, nats", "same top-1", "baseline loss", "candidate loss"]
    rows = [_position(error) for error in report.accuracy.positions]
    grid = Grid("Error by position in the context", header, rows, right=(1, 2, 3, 4))
    note = Note("Means over all samples; losses are in nats per token, lower is better.")
    return Part("positions", "Error by position", [grid, note])


def _position(error: PositionError) -> list[str]:
    losses = (error.baseline_loss, error.candidate_loss)
    return [
        f"{error.first:,}" if error.first == error.last else f"{error.first:,} to {error.last:,}",
        significant(error.kl_divergence, 3),
        f"{100 * error.top1_agreement:.1f} %",
        *("-" if loss is None else significant(loss, 4) for loss in losses),
    ]
