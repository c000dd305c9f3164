"""The whole comparison in one sentence, in single statements, and in two words."""

from __future__ import annotations

import math
from collections import Counter

from exporter.artifacts import RUN_IN_FP32, Accuracy, ComparisonReport
from exporter.artifacts.figures import BRIEF, FIGURES, Reading
from exporter.report.sections.blocks import Sign, verdict_sign
from exporter.report.sections.latency import corners_sentence
from exporter.report.words import counted_kind, kinds_and_layers, listed, shape_words, speedup_range

_ALL = {
    "faster": "it is faster in {}, {} times as fast",
    "slower": "it is slower in {}, {} times as fast",
    "same": "it takes the same time in {}",
    "inconclusive": "whether it is faster can't be told from {}",
}
_SOME = {
    "faster": "faster in {}",
    "slower": "slower in {}",
    "same": "as fast in {}",
    "inconclusive": "without a verdict in {}",
}
_OPEN_LOSS = 0.02
"""Of log perplexity: `export` allows so much usually. An interval beyond it leaves a loss open."""


def headline(report: ComparisonReport) -> str:
    """What was done, in one line: ``Without 8 attentions and 1 MLP``."""
    records = [arm.quantization for arm in (report.arms.baseline, report.arms.candidate)]
    schemes = {None if record is None else record.scheme for record in records}
    scheme = schemes.pop() if len(schemes) == 1 else None
    quantized = f", in {scheme}" if scheme else ""
    kinds = kinds_and_layers(report.plan).items()
    if not kinds:
        return f"Candidate against baseline{quantized}"
    return f"Without {listed([counted_kind(kind, len(ls)) for kind, ls in kinds])}{quantized}"


def verdict_sentence(report: ComparisonReport) -> str:
    """What was done, what it does to the speed, and what it does to the answers."""
    text = f"{headline(report)}, {_speed(report)}; {_quality(report.accuracy)}."
    return " ".join(filter(None, [text, corners_sentence(report)]))


def speed_sign(report: ComparisonReport) -> Sign:
    """All rows' verdicts as one word; rows of both kinds are ``mixed``, not averaged."""
    words: set[str] = {row.verdict for row in report.latency}
    if not words:
        return Sign("speed not measured", "unsure")
    if len(words) == 1:
        return verdict_sign(words.pop())
    if {"faster", "slower"} <= words:
        return Sign("mixed speed", "unsure")
    if "slower" in words:
        return Sign("partly slower", "bad")
    if "faster" in words:
        return Sign("partly faster", "good")
    return Sign("same or inconclusive", "unsure")


def quality_sign(report: ComparisonReport) -> Sign:
    """By what both arms have, and its interval; other figures have no side known to be worse."""
    accuracy = report.accuracy
    if accuracy is None:
        return Sign("accuracy not measured", "unsure")
    figure = next(one for one in BRIEF if one.has_before)
    one = next(figure.readings(accuracy), None)
    if one is None:
        return _agreement_sign(accuracy)
    low, high = _log_change(one)
    if low > 0:
        return Sign("less accurate", "bad")
    if high < 0:
        return Sign("more accurate", "good")
    if math.isnan(low):
        return Sign("accuracy is no number", "bad")
    if math.isinf(high - low) or high > _OPEN_LOSS:
        return Sign("can't tell whether it is less accurate", "unsure")
    return Sign("no clear loss of accuracy", "even")


def _agreement_sign(accuracy: Accuracy) -> Sign:
    """Of an encoder: what both arms share says how far the cut moved, not whether it is worse."""
    for figure in FIGURES:
        for one in figure.readings(accuracy) if figure.of_the_cut else ():
            return Sign(f"{figure.name}: {figure.row(one.value)}", "unsure")
    return Sign("accuracy not measured", "unsure")


def _log_change(one: Reading) -> tuple[float, float]:
    """The interval of the change of the log: all numbers where no sample tells of it."""
    if one.interval is not None:
        return one.interval.ci95
    if not (one.before and one.before > 0 and one.value > 0):
        return math.nan, math.nan
    change = math.log(one.value) - math.log(one.before)
    # Predictions that are the same, or rule out what stands in the text, need no samples.
    needs_no_interval = change == 0 or not math.isfinite(change)
    return (change, change) if needs_no_interval else (-math.inf, math.inf)


def _speed(report: ComparisonReport) -> str:
    rows = report.latency
    if not rows:
        reasons = (report.arms.baseline.not_run, report.arms.candidate.not_run)
        why = next((reason for reason in reasons if reason), None)
        return "its speed was not measured" + (f" ({why.rstrip('.')})" if why else "")
    counts: Counter[str] = Counter(row.verdict for row in rows)
    if len(counts) == 1:
        names = {1: shape_words(rows[0]), 2: "both shapes"}
        where = names.get(len(rows), f"all {len(rows)} shapes")
        ratios = speedup_range([row.speedup.ratio for row in rows])
        return _ALL[rows[0].verdict].format(where, ratios)
    result = [_SOME[word].format(counts[word]) for word in _SOME if counts[word]]
    return f"it is {listed(result)} of {len(rows)} shapes"


def _quality(accuracy: Accuracy | None) -> str:
    for figure in FIGURES:
        for one in figure.readings(accuracy) if figure.sentence else ():
            before = "" if one.before is None else figure.row(one.before)
            value = figure.row(one.value)
            return figure.sentence.format(before=before, value=value, change=figure.change(one))
    return "its accuracy was not measured"


def notices(report: ComparisonReport) -> list[str]:
    """Whose the figures are, where they aren't those of the files as they are."""
    arms = {"baseline": report.arms.baseline, "candidate": report.arms.candidate}
    reasons = {name: arm.not_run for name, arm in arms.items() if arm.not_run is not None}
    if len(reasons) == 2 and len(set(reasons.values())) == 1:
        names = [f"The engines of both arms: {reasons['baseline']}."]
    else:
        names = [f"The engines of the {name}: {reason}." for name, reason in reasons.items()]
    wide = [name for name, arm in arms.items() if arm.precision.endswith(RUN_IN_FP32)]
    if wide:
        whose = "Both arms are" if len(wide) > 1 else f"The {wide[0]} is"
        names.append(
            f"{whose} in bfloat16, for which ONNX Runtime's CPU has no kernels: times and accuracy "
            "are those of the same weights in float32, and tell little of bfloat16's own speed."
        )
    return names


def why_no_accuracy(report: ComparisonReport) -> str:
    """Why a report has none."""
    if not report.latency and report.arms.baseline.not_run is not None:
        return "nothing was run"
    return "the models have no output called logits"
