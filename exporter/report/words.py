"""The words and rows that every form of the report shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from exporter.artifacts import (
    FEWEST_ROUNDS,
    RUN_IN_FP32,
    Arm,
    ComparisonReport,
    LatencyRow,
    PlannedDeletion,
)

Row = tuple[str, str, str, str, str]
"""What, baseline, candidate, change, verdict."""

HEADER: Row = ("", "baseline", "candidate", "change", "verdict")

_GENERATION = {
    "first_token": "first token",
    "per_token": "each later token of {new}",
    "generate": "generation of {new} tokens",
}
_SHORT = {"first_token": "first token", "per_token": "per token", "generate": "generate"}

_NOUNS = {
    "attention": ("attention", "attentions"),
    "mlp": ("MLP", "MLPs"),
    "block": ("block", "blocks"),
    "cross_attention": ("cross-attention", "cross-attentions"),
    "mixer": ("mixer", "mixers"),
}


def latency_rows(report: ComparisonReport) -> list[Row]:
    """Median times of both arms, the speedup with its interval, and the verdict."""
    return [
        (
            f"{short_shape(row)}, ms",
            milliseconds(row.baseline.median_ms),
            milliseconds(row.candidate.median_ms),
            speedup_words(row.speedup.ratio, row.speedup.ci95, digits=2),
            row.verdict,
        )
        for row in report.latency
    ]


def accuracy_rows(report: ComparisonReport) -> list[Row]:
    """Perplexity, KL divergence and agreement; what was not measured is left out."""
    accuracy = report.accuracy
    if accuracy is None:
        return []
    rows: list[Row] = []
    if accuracy.perplexity is not None:
        pair = accuracy.perplexity
        change = relative_change(pair.baseline, pair.candidate)
        rows.append(
            ("perplexity", significant(pair.baseline), significant(pair.candidate), change, "")
        )
    if accuracy.kl_divergence is not None:
        rows.append(("KL divergence, nats", "", significant(accuracy.kl_divergence, 3), "", ""))
    if accuracy.top1_agreement is not None:
        rows.append(("same top-1 token", "", f"{100 * accuracy.top1_agreement:.1f} %", "", ""))
    return rows


def size_rows(report: ComparisonReport) -> list[Row]:
    """Bytes on disk, parameters, nodes, and KV cache per token; what is none is left out."""
    before, after = report.arms.baseline, report.arms.candidate
    sizes = (
        ("files, MB", before.file_bytes / 1e6, after.file_bytes / 1e6, 1),
        ("parameters, million", before.parameters / 1e6, after.parameters / 1e6, 2),
        ("graph nodes", before.nodes, after.nodes, 0),
        (
            "KV bytes per token",
            before.kv_cache_bytes_per_token,
            after.kv_cache_bytes_per_token,
            0,
        ),
    )
    return [_size_row(*size) for size in sizes if size[1] or size[2]]


def _size_row(what: str, before: float, after: float, digits: int) -> Row:
    change = relative_change(before, after)
    return (what, f"{before:,.{digits}f}", f"{after:,.{digits}f}", change, "")


def verdict_sentences(report: ComparisonReport) -> list[str]:
    """The result in plain words, the most important first."""
    sentences = notices(report)
    sentences += [_latency_sentence(row) for row in report.latency]
    sentences += _accuracy_sentences(report)
    before, after = (
        arm.kv_cache_bytes_per_token for arm in (report.arms.baseline, report.arms.candidate)
    )
    if before and before != after:
        change = relative_change(before, after)
        sentences.append(
            f"The KV cache takes {after:,} bytes per token, not {before:,} ({change})."
        )
    return sentences


def headline(report: ComparisonReport) -> str:
    """What was done, in one line: ``Without 8 attentions and 1 MLP``."""
    counts = [
        f"{len(layers)} {_noun(kind, len(layers))}"
        for kind, layers in _by_kind(report.plan).items()
    ]
    scheme = _common_scheme(report)
    quantized = f", in {scheme}" if scheme else ""
    if not counts:
        return f"Candidate against baseline{quantized}"
    told = " and ".join(filter(None, [", ".join(counts[:-1]), counts[-1]]))
    return f"Without {told}{quantized}"


def _common_scheme(report: ComparisonReport) -> str | None:
    """Into what both arms are quantised; None where they aren't, or not alike."""
    records = [arm.quantization for arm in (report.arms.baseline, report.arms.candidate)]
    schemes = {None if record is None else record.scheme for record in records}
    return schemes.pop() if len(schemes) == 1 else None


def named_arms(report: ComparisonReport) -> dict[str, Arm]:
    """Both arms and the references, by name."""
    arms = report.arms
    return {"baseline": arms.baseline, "candidate": arms.candidate, **arms.references}


def weights_words(arm: Arm) -> str:
    """How an arm's weights are kept: its precision, or how they were quantised."""
    return arm.precision if arm.quantization is None else arm.quantization.name


def _latency_sentence(row: LatencyRow) -> str:
    low, high = row.speedup.ci95
    what, ratio = shape_words(row).capitalize(), f"{row.speedup.ratio:.3f} times as fast"
    if has_too_few_rounds(row):
        return (
            f"{what} gets no verdict: that takes {FEWEST_ROUNDS} rounds, and it was timed in "
            f"{row.rounds} ({ratio})."
        )
    limit = f"{100 * row.threshold:.3g} %"
    spent = "in its time budget " if row.stopped == "budget" else ""
    openings = {
        "faster": "is faster",
        "slower": "is slower",
        "same": f"takes the same time to within {limit}",
        "inconclusive": f"gets no verdict: {spent}it couldn't be told to be at least {limit} "
        f"faster, at least {limit} slower, or the same to within {limit}",
    }
    return (
        f"{what} {openings[row.verdict]} ({ratio}, 95 % interval {low:.3f} to {high:.3f}"
        f"{_per_second(row)})."
    )


def _per_second(row: LatencyRow) -> str:
    """Tokens of a whole generation in a second, of both arms."""
    if row.phase != "generate":
        return ""
    tokens = row.batch * row.new_tokens * 1000
    speeds = [significant(tokens / arm.median_ms, 3) for arm in (row.baseline, row.candidate)]
    return f"; {speeds[0]} and {speeds[1]} tokens/s"


def has_too_few_rounds(row: LatencyRow) -> bool:
    """Whether a row was timed in too few rounds for its interval to be one of 95 %."""
    return row.rounds < FEWEST_ROUNDS


def why_no_accuracy(report: ComparisonReport) -> str:
    """Why a report has none."""
    if not report.latency and report.arms.baseline.not_run is not None:
        return "nothing was run"
    if report.latency and all(row.imported for row in report.latency):
        return "times alone tell nothing of it"
    return "the models have no output called logits"


def notices(report: ComparisonReport) -> list[str]:
    """Whose the figures are, where they aren't those of the files as they are."""
    return [*_engine_sentences(report), *_precision_sentences(report)]


def _precision_sentences(report: ComparisonReport) -> list[str]:
    wide = [
        name
        for name, arm in (("baseline", report.arms.baseline), ("candidate", report.arms.candidate))
        if arm.precision.endswith(RUN_IN_FP32)
    ]
    if not wide:
        return []
    whose = "Both arms are" if len(wide) > 1 else f"The {wide[0]} is"
    return [
        f"{whose} in bfloat16, for which ONNX Runtime's CPU has no kernels: times and accuracy are "
        "those of the same weights in float32, and tell little of bfloat16's own speed."
    ]


def _engine_sentences(report: ComparisonReport) -> list[str]:
    reasons = report.arms.baseline.not_run, report.arms.candidate.not_run
    if reasons[0] == reasons[1] and reasons[0] is not None:
        return [f"The engines of both arms: {reasons[0]}."]
    return [
        f"The engines of the {name}: {reason}."
        for name, reason in zip(("baseline", "candidate"), reasons, strict=True)
        if reason is not None
    ]


def _accuracy_sentences(report: ComparisonReport) -> list[str]:
    accuracy = report.accuracy
    if accuracy is None:
        return [f"Accuracy was not measured: {why_no_accuracy(report)}."]
    sentences = []
    if accuracy.perplexity is not None:
        pair = accuracy.perplexity
        sentences.append(
            f"Perplexity goes from {significant(pair.baseline)} to {significant(pair.candidate)} "
            f"({relative_change(pair.baseline, pair.candidate)}; lower is better)."
        )
    if accuracy.top1_agreement is not None:
        sentences.append(
            f"Both find the same token most likely at {100 * accuracy.top1_agreement:.1f} % "
            f"of {accuracy.tokens:,} positions."
        )
    return sentences


def dropped_lines(plan: Sequence[PlannedDeletion]) -> list[str]:
    """One line a kind: which layers, and what took their place."""
    return [
        f"{len(layers)} {_noun(kind, len(layers))}: "
        f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"
        for kind, layers in _by_kind(plan).items()
    ]


def _by_kind(plan: Sequence[PlannedDeletion]) -> dict[str, list[str]]:
    kinds, found = list(_NOUNS), dict[str, list[str]]()
    for deletion in sorted(plan, key=lambda d: (kinds.index(d.kind), d.layer)):
        place = "" if deletion.replacement == "none" else f" ({deletion.replacement})"
        found.setdefault(deletion.kind, []).append(f"{deletion.layer}{place}")
    return found


def _noun(kind: str, number: int) -> str:
    return _NOUNS[kind][0 if number == 1 else 1]


def shape_words(row: LatencyRow) -> str:
    """What was timed: ``prefill of 512 tokens``, ``decode after 512 tokens``."""
    batch = f", batch {row.batch}" if row.batch > 1 else ""
    if row.phase == "run":
        return "a run of a shape that isn't told"
    if row.phase in _GENERATION:
        what = _GENERATION[row.phase].format(new=row.new_tokens)
        return f"{what} after a prompt of {row.sequence_length}{batch}"
    if row.phase == "decode":
        return f"decode after {row.past_length} tokens{batch}"
    return f"{row.phase} of {row.sequence_length} tokens{batch}"


def short_shape(row: LatencyRow) -> str:
    """The same for a narrow column: ``prefill 512``, ``decode at 512``."""
    batch = f" x {row.batch}" if row.batch > 1 else ""
    if row.phase == "run":
        return "run"
    if row.phase in _GENERATION:
        return f"{_SHORT[row.phase]} {row.sequence_length}+{row.new_tokens}{batch}"
    if row.phase == "decode":
        return f"decode at {row.past_length}{batch}"
    return f"{row.phase} {row.sequence_length}{batch}"


def speedup_words(ratio: float, ci95: tuple[float, float], *, digits: int = 3) -> str:
    """The ratio with its interval: ``1.130x [1.101, 1.153]``."""
    low, high = (f"{bound:.{digits}f}" for bound in ci95)
    return f"{ratio:.{digits}f}x [{low}, {high}]"


def speedup_range(ratios: Iterable[float], between: str = " to ") -> str:
    """From the least to the greatest ratio: ``1.09 to 1.11``."""
    told = sorted({f"{ratio:.2f}" for ratio in ratios}, key=float)
    return told[0] if len(told) == 1 else f"{told[0]}{between}{told[-1]}"


def milliseconds(value_ms: float) -> str:
    """Three significant digits."""
    return significant(value_ms, 3)


def significant(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, without an exponent where it can be read so.

    Zeros at the end stay, as ``1.50`` beside ``1.25``: they say how exact the number is. An exact
    zero is ``0``.
    """
    if value == 0:
        return "0"
    rounded = f"{value:.{digits - 1}e}"
    exponent = int(rounded.partition("e")[2]) if math.isfinite(value) else 0
    if not -3 <= exponent < 6:
        return rounded
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def relative_change(before: float, after: float) -> str:
    """Percent with a sign; nothing where there was nothing before."""
    if not before:
        return ""
    percent = 100 * (after / before - 1)
    return f"{percent:+.1f} %" if abs(percent) < 1000 else f"x {after / before:,.0f}"
