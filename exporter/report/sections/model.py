"""What the arms are: sizes, forms, what was dropped, importance, parity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from exporter.artifacts import Arm, ComparisonReport, ImportanceReport, PlannedDeletion
from exporter.artifacts.stacks import Stacks
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
from exporter.report.words import KINDS, dropped_lines, named_arms, read_by, weights_words

CPU = "CPUExecutionProvider"
"""Where exporter.export.parity runs, whatever is timed."""
_ALWAYS = ("attention", "mlp", "block")


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
    blocks = [Bullets(lines), *parts_blocks(report.parts, read=read_by(report))]
    return Section("dropped", "What was dropped", blocks)


def _dropped(plan: Sequence[PlannedDeletion]) -> set[tuple[int, str]]:
    """By layer and kind; a dropped block is all of its layer's sublayers."""
    return {
        (deletion.layer, kind)
        for deletion in plan
        for kind in (_ALWAYS if deletion.kind == "block" else (deletion.kind,))
    }


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


def importance_section(report: ImportanceReport, plan: Sequence[PlannedDeletion]) -> Section:
    """A table with a row a layer; what the plan drops is marked."""
    gone = _dropped(plan)
    scores: dict[tuple[int, str], float] = {(s.layer, s.kind): s.score for s in report.scores}
    scored = {kind for _, kind in scores}
    kinds = [kind for kind in KINDS if kind in scored or kind in _ALWAYS]
    digits = _decimal_places(list(scores.values()))

    def cell(layer: int, kind: str) -> Cell:
        if (score := scores.get((layer, kind))) is None:
            return "-"
        text = f"{score:.{digits}f}"
        return Sign(text, "cut") if gone & {(layer, kind), (layer, "block")} else text

    rows: list[list[Cell]] = [
        [str(layer), *(cell(layer, kind) for kind in kinds)]
        for layer in sorted({layer for layer, _ in scores})
    ]
    others = [item.metric for item in report.further]
    also = f" Also scored by {', '.join(others)}." if others else ""
    if (encoder := report.model.encoder_layers) is not None:
        words = Stacks(encoder, report.model.num_layers - encoder).words()
        also += f" {words[0].upper()}{words[1:]}."
    note = Note(
        f"Metric: {report.metric}. Lower is more redundant; what was dropped stands in bold.{also}"
    )
    header = ["layer", *(KINDS[kind].one for kind in kinds)]
    grid = Grid("Importance by layer", header, rows, right=range(len(header)))
    return Section("importance", "Importance", [note, grid])


def _decimal_places(scores: Sequence[float]) -> int:
    """With which a middling score has three digits; four at least."""
    sizes = sorted(abs(score) for score in scores if score and math.isfinite(score))
    middle = sizes[len(sizes) // 2] if sizes else 1.0
    return max(4, 2 - math.floor(math.log10(middle)))
