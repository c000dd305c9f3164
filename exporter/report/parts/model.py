"""What the arms are: sizes, what was dropped, importance, parity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from exporter.artifacts import Arm, ComparisonReport, ImportanceReport, PlannedDeletion
from exporter.report.parts.part import Bullets, Cell, Grid, Note, Part, Sign
from exporter.report.words import (
    HEADER,
    dropped_lines,
    named_arms,
    significant,
    size_rows,
    weights_words,
)

CPU = "CPUExecutionProvider"
"""Where exporter.export.parity runs, whatever is timed."""

_TITLES = {
    "attention": "attention",
    "mlp": "MLP",
    "block": "block",
    "cross_attention": "cross-attention",
    "mixer": "mixer",
}
_ALWAYS = ("attention", "mlp", "block")


def size_part(report: ComparisonReport) -> Part | None:
    """Bytes, parameters, nodes, KV cache of both arms; None where none is known."""
    rows = [row[:4] for row in size_rows(report)]
    if not rows:
        return None
    return Part("size", "Size", [Grid("Size of both arms", HEADER[:4], rows, right=(1, 2, 3))])


def forms_part(report: ComparisonReport) -> Part | None:
    """How each arm's graph is written, and its weights; None where no graph notes anything."""
    arms = named_arms(report)
    if not any(arm.form or arm.quantization for arm in arms.values()):
        return None
    header = ["arm", "form", "fused operators", "weights", "products by bits"]
    grid = Grid("How the graphs are written", header, [_form(*arm) for arm in arms.items()])
    return Part("forms", "Form and weights", [grid, *_remarks(arms)])


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
    told: dict[str, list[str]] = {}
    for name, arm in arms.items():
        if arm.form and arm.form.remark:
            told.setdefault(arm.form.remark, []).append(name)
    for remark, names in told.items():
        yield Note(remark, lead=f"Form of {', '.join(names)}:")


def dropped_part(report: ComparisonReport) -> Part:
    """Which sublayers, by kind."""
    lines = dropped_lines(report.plan) or ["No deletion is on record."]
    return Part("dropped", "What was dropped", [Bullets(lines)])


def parity_part(report: ComparisonReport) -> Part | None:
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
    return Part("parity", "Parity", [grid, *_parity_device(report)])


def _parity_device(report: ComparisonReport) -> list[Note]:
    """Says that these checks are none of the device that was timed, where that is so."""
    provider = report.arms.baseline.provider
    if provider == CPU:
        return []
    return [
        Note(
            f"These checks ran on the CPU ({CPU}), not on {provider}, where the arms were "
            "timed and compared."
        )
    ]


def importance_part(report: ImportanceReport, dropped: Sequence[PlannedDeletion]) -> Part:
    """A table with a row a layer; what the plan drops is signed.

    Args:
        report: The scores; lower means more redundant.
        dropped: The plan's deletions. A dropped block marks all of its layer's sublayers.
    """
    gone = {(deletion.layer, deletion.kind) for deletion in dropped}
    scores: dict[tuple[int, str], float] = {(s.layer, s.kind): s.score for s in report.scores}
    kinds = [
        kind for kind in _TITLES if kind in _ALWAYS or any(kind == other for _, other in scores)
    ]

    places = _places(list(scores.values()))

    def cell(layer: int, kind: str) -> Cell:
        score = scores.get((layer, kind))
        if score is None:
            return "-"
        is_gone = (layer, kind) in gone or (layer, "block") in gone
        told = f"{score:.{places}f}"
        return Sign(told, "cut") if is_gone else told

    rows: list[list[Cell]] = [
        [str(layer), *(cell(layer, kind) for kind in kinds)]
        for layer in sorted({layer for layer, _ in scores})
    ]
    header = ["layer", *(_TITLES[kind] for kind in kinds)]
    others = [each.metric for each in report.further]
    also = f" Also scored by {', '.join(others)}." if others else ""
    note = (
        f"Metric: {report.metric}. Lower is more redundant; what was dropped stands in bold.{also}"
    )
    grid = Grid("Importance by layer", header, rows, right=range(len(header)))
    return Part("importance", "Importance", [Note(note), grid])


def _places(scores: Sequence[float]) -> int:
    """Decimal places with which a middling score has three digits; four at least."""
    sizes = sorted(abs(score) for score in scores if score and math.isfinite(score))
    middle = sizes[len(sizes) // 2] if sizes else 1.0
    return max(4, 2 - math.floor(math.log10(middle)))
