"""The grid of four: the whole and the cut model, in float and quantised; or of more cuts.

The two arms with a verdict are the quantised ones; the two in float, and further ones, are timed in
the same rounds and read the same text. All are held against the whole model in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporter.artifacts import (
    FLOAT_BASELINE,
    FLOAT_CANDIDATE,
    Corner,
    Interval,
    LatencyRow,
    VerdictWord,
)
from exporter.compare.arms import ComparedArm, Pair
from exporter.compare.timing.statistics import speedup_between, times_of
from exporter.compare.timing.verdict import verdict_of_interval
from exporter.errors import ComparisonError

_PRUNED = ("candidate", FLOAT_CANDIDATE)
_ALIKE = (
    *("scheme", "method", "block_size", "symmetric", "accuracy_level"),
    *("embedding_bits", "head_bits"),
)
"""What both quantised models must have in common; how many products there are they can't."""


@dataclass(frozen=True)
class GridAccuracy:
    """How good one arm's answers are, held against the whole model in float."""

    perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    exact_match: float | None = None
    embedding_cosine: float | None = None
    other_perplexity: float | None = None
    log_perplexity_increase: Interval | None = None
    other_log_perplexity_increase: Interval | None = None


def quantization_grid(
    pair: Pair, rows: Sequence[LatencyRow], answers: Mapping[str, GridAccuracy]
) -> list[Corner]:
    """All of them, the whole model in float first; none for a pair alone.

    Args:
        pair: The arms.
        rows: Their times.
        answers: By arm; those that were not judged are left out.
    """
    return [
        Corner(
            arm=name,
            whole=whole,
            pruned=_is_pruned(pair, name),
            quantized=_is_quantized(pair, name),
            file_bytes=pair.judged[name].facts.file_bytes,
            speedups=_speedups(rows, pair.whole, name),
            over_whole={} if whole is None else _speedups(rows, whole, name),
            verdicts={} if whole is None else _verdicts(rows, whole, name),
            **vars(answers.get(name, GridAccuracy())),
        )
        for name, whole in wholes_alike(pair).items()
    ]


def wholes_alike(pair: Pair) -> dict[str, str | None]:
    """By arm the whole model in the same form, if that is another arm."""
    wholes = [name for name in pair.grid if not _is_pruned(pair, name)]
    return {name: _alike(pair, wholes, name) for name in pair.grid}


def _is_pruned(pair: Pair, name: str) -> bool:
    """By the arm's place among the usual four; a further one says so itself."""
    return bool(pair.references[name].plan()) if name in pair.also else name in _PRUNED


def _is_quantized(pair: Pair, name: str) -> bool:
    """Likewise."""
    if pair.has_floats and name not in pair.also:
        return name not in (FLOAT_BASELINE, FLOAT_CANDIDATE)
    return pair.judged[name].quantization is not None


def _alike(pair: Pair, wholes: Sequence[str], name: str) -> str | None:
    """The whole model in the same form as a cut one, if it is among the arms.

    The arms of a pair are of one form, also where their graphs don't say how they were quantised.
    """
    if name == "candidate":
        return "baseline"
    own = _form(pair.judged[name])
    found = (whole for whole in wholes if _form(pair.judged[whole]) == own)
    return None if name in wholes else next(found, None)


def _form(arm: ComparedArm) -> list[object]:
    record = arm.quantization
    return [arm.facts.precision, *(getattr(record, field, None) for field in _ALIKE)]


def _speedups(rows: Sequence[LatencyRow], whole: str, name: str) -> dict[str, Interval]:
    found = {}
    for row in rows if whole != name else ():
        if {name, whole} <= times_of(row).keys():
            speedup = speedup_between(row, whole, name)
            found[row.shape_name] = Interval(value=speedup.ratio, ci95=speedup.ci95)
    return found


def _verdicts(rows: Sequence[LatencyRow], whole: str, name: str) -> dict[str, VerdictWord]:
    """The row's own of its two arms; of others that of the interval."""
    return {
        row.shape_name: row.verdict
        if (whole, name) == ("baseline", "candidate")
        else verdict_of_interval(speedup_between(row, whole, name).ci95, row.rounds)
        for row in rows
        if {name, whole} <= times_of(row).keys()
    }


def refuse_no_grid(pair: Pair) -> None:
    """Refuses arms that aren't one model, whole and cut, in float and quantised alike.

    What a graph doesn't note of itself can't be held against it.

    Raises:
        ComparisonError: A float arm is quantised or one of the pair's own files; both arms are
            quantised otherwise; or the two cut ones lack other sublayers.
    """
    if not pair.has_floats:
        return
    arms = pair.judged
    for name in (FLOAT_BASELINE, FLOAT_CANDIDATE):
        _refuse_quantized(name, arms[name])
    for quantized, original in (("baseline", FLOAT_BASELINE), ("candidate", FLOAT_CANDIDATE)):
        _refuse_same_file(quantized, arms[quantized], arms[original])
        _refuse_other_plan(quantized, arms[quantized], arms[original])
    _refuse_unlike(pair.baseline, pair.candidate)


def _refuse_quantized(name: str, arm: ComparedArm) -> None:
    record = arm.quantization
    if record is not None:
        raise ComparisonError(
            f"The {name} {arm.folder.onnx} is quantised ({record.scheme}).",
            "Give the model that it was quantised from.",
            code="baseline-quantized",
        )


def _refuse_same_file(name: str, quantized: ComparedArm, original: ComparedArm) -> None:
    if quantized.facts.sha256 == original.facts.sha256:
        raise ComparisonError(
            f"The {name} {quantized.folder.onnx} and its float form are the same file.",
            "Name the quantised models first, and what they were quantised from behind --float.",
            code="same-file",
        )


def _refuse_other_plan(name: str, quantized: ComparedArm, original: ComparedArm) -> None:
    if quantized.plan() != original.plan():
        raise ComparisonError(
            f"The {name} {quantized.folder.onnx} and its float form {original.folder.onnx} "
            "lack different sublayers, by their own metadata.",
            "Give the model that it was quantised from.",
            code="other-sublayers",
        )


def _refuse_unlike(baseline: ComparedArm, candidate: ComparedArm) -> None:
    records = baseline.quantization, candidate.quantization
    if records[0] is None or records[1] is None:
        return
    for field in _ALIKE:
        first, second = (getattr(record, field) for record in records)
        if first != second:
            raise ComparisonError(
                f"The baseline and the candidate are quantised in different ways: {field} is "
                f"{first} and {second}.",
                "Quantise both alike, or leave --float out.",
                code="quantized-differently",
            )
