"""What the arms are: sizes, forms, what was dropped, parity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from exporter.artifacts import Arm, ComparisonReport
from exporter.printable import significant
from exporter.report.sections.blocks import (
    Bullets,
    Cell,
    Grid,
    Note,
    Section,
    Sign,
    parts_blocks,
)
from exporter.report.sections.summary import size_grid
from exporter.report.words import dropped_lines, named_arms, read_by, weights_words

CPU = "CPUExecutionProvider"
"""Where exporter.export.parity runs, whatever is timed."""


def size_section(report: ComparisonReport) -> Section | None:
    """Bytes, parameters, nodes, KV cache of both arms; None where none is known."""
    grid = size_grid(report, "Size of both arms")
    return Section("size", "Size", [grid]) if grid.rows else None


def forms_section(report: ComparisonReport) -> Section | None:
    """How each arm's graph is written, and its weights; None where no graph notes anything."""
    arms = named_arms(report)
    if not any(arm.form or arm.quantization for arm in arms.values()):
        return None
    header = ["arm", "form", "fused operators", "weights", "products by bits"]
    grid = Grid("How the graphs are written", header, [_form(*arm) for arm in arms.items()])
    return Section("forms", "Form and weights", [grid, *_remarks(arms)])


def _form(name: str, arm: Arm) -> list[str]:
    form, quantization = arm.form, arm.quantization
    bits = {} if quantization is None else quantization.bits
    return [
        name,
        "-" if form is None else form.name,
        ", ".join(f"{count} {op}" for op, count in form.fused.items()) if form else "-",
        weights_words(arm),
        ", ".join(f"{count} of {width} bits" for width, count in bits.items()) or "-",
    ]


def _remarks(arms: Mapping[str, Arm]) -> Iterator[Note]:
    """Why an arm has no faster form, once for all of which it is true."""
    lines: dict[str, list[str]] = {}
    for name, arm in arms.items():
        if arm.form and arm.form.remark:
            lines.setdefault(arm.form.remark, []).append(name)
    for remark, names in lines.items():
        yield Note(remark, lead=f"Form of {', '.join(names)}:")


def dropped_section(report: ComparisonReport) -> Section:
    """Which sublayers, by kind."""
    lines = dropped_lines(report.plan) or ["No deletion is on record."]
    if (own := report.arms.baseline.encoder_layers) and report.plan:
        lines.append(f"Layers 0 to {own - 1} are the encoder's, those from {own} on the decoder's.")
    blocks = [Bullets(lines), *parts_blocks(report.parts, read=read_by(report))]
    return Section("dropped", "What was dropped", blocks)


def parity_section(report: ComparisonReport) -> Section | None:
    """Every check against a witness; None where none was made."""
    if not report.parity:
        return None
    rows: list[list[Cell]] = [
        [
            check.name,
            check.phase,
            significant(check.max_abs_error, 2),
            significant(check.tolerance, 2),
            "holds" if check.passed else Sign("does not hold", "bad"),
        ]
        for check in report.parity
    ]
    header = ["check", "phase", "max abs error", "tolerance", "result"]
    grid = Grid("Outputs against a witness", header, rows, right=(2, 3))
    provider = report.arms.baseline.provider
    elsewhere = f"not on {provider}, where the arms were timed and compared."
    notes = [Note(f"These checks ran on the CPU ({CPU}), {elsewhere}")] if provider != CPU else []
    return Section("parity", "Parity", [grid, *notes])
