"""The gate's findings in words: for the terminal, and for what CI systems show."""

from __future__ import annotations

from collections import Counter

from exporter.artifacts import (
    Check,
    CheckReport,
    CheckVerdict,
    Drift,
)
from exporter.report.sections.blocks import Grid
from exporter.report.words import milliseconds, significant

VERDICT_WORDS: dict[CheckVerdict, str] = {
    "regressed": "regression",
    "inconclusive": "can't tell",
    "improved": "improved",
    "within_limit": "within the limit",
}
"""What people read for each verdict, the worst first."""

_NAMES = {
    "kl_divergence": "KL divergence",
    "top1_agreement": "same top-1 token",
    "embedding_cosine": "cosine of embeddings",
    "rank_agreement": "ranking of pairs, Spearman",
}
_UNITS = {"time": " ms", "speedup": " ms"}


def check_name(check: Check) -> str:
    """``decode at 512: time``."""
    return f"{check.subject}: {_NAMES.get(check.quantity, check.quantity)}"


def check_grid(found: CheckReport) -> Grid:
    """A row a check."""
    rows = [
        (
            check_name(check),
            "" if check.before is None else _amount(check, check.before),
            "" if check.after is None else _amount(check, check.after),
            change_words(check),
            limit_words(check),
            VERDICT_WORDS[check.verdict],
        )
        for check in found.checks
    ]
    header = ("what", "before", "after", "value [judged by]", "limit", "verdict")
    return Grid("depthcut check", header, rows, right=(1, 2, 3, 4))


def model_lines(found: CheckReport) -> list[str]:
    """Which models are judged, a line each; none for a check of a version that didn't keep them."""
    if found.models is None:
        return []
    named = {
        "Baseline": found.models.baseline,
        "Candidate": found.models.candidate,
        "Candidate of the earlier report": found.models.earlier,
    }
    return [f"{what}: {path}" for what, path in named.items() if path is not None]


def reasons(found: CheckReport) -> list[str]:
    """What there is to say beside the table, a line each."""
    of_checks = [f"{check_name(check)}: {check.reason}" for check in found.checks if check.reason]
    return [*of_checks, *remarks(found)]


def remarks(found: CheckReport) -> list[str]:
    """The same without the reasons of single checks: what is told of the run as a whole."""
    return [
        *(
            f"Accepted difference. {d.field}: {d.baseline} there, {d.report} here."
            for d in found.accepted_differences
        ),
        *(f"Drift. {drift_sentence(drift)}" for drift in found.drift),
        *found.notes,
    ]


def check_sentence(check: Check) -> str:
    """One check in one line, with the reason for its verdict."""
    change = "" if check.value is None else f" {change_words(check)}"
    limit = "" if check.limit is None else f", limit {limit_words(check)}"
    words = f"{check_name(check)}{change}{limit}: {VERDICT_WORDS[check.verdict]}."
    return f"{words} {check.reason}".strip()


def change_words(check: Check) -> str:
    """The value with its interval: ``+3.1 % [+2.0, +4.2]``, ``1.09x [1.07, 1.11]``."""
    if check.value is None:
        return "missing"
    value = _value(check, check.value)
    return value if check.ci95 is None else f"{value} {interval_words(check, check.ci95)}"


def interval_words(check: Check, ci95: tuple[float, float]) -> str:
    """An interval of the check's value, in the value's unit: ``[+2.0, +4.2]``."""
    low, high = (_value(check, bound).removesuffix(" %").removesuffix("x") for bound in ci95)
    return f"[{low}, {high}]"


def limit_words(check: Check) -> str:
    """What is allowed: ``at most +3.0 %``."""
    if check.limit is None:
        return ""
    side = "at most" if check.better == "lower" else "at least"
    return f"{side} {_value(check, check.limit)}"


def drift_sentence(drift: Drift) -> str:
    """A slow change in one line."""
    low, high = (100 * bound for bound in drift.ci95)
    return (
        f"{drift.subject}: over {drift.entries} runs, from {drift.first} to {drift.last}, the time "
        f"relative to the unpruned arm grew by {100 * (drift.total - 1):.1f} %, "
        f"{100 * drift.per_entry:.2f} % a run [{low:.2f} %, {high:.2f} %] "
        f"(Mann-Kendall p = {drift.p_value:.1g})."
    )


def conclusion(found: CheckReport) -> str:
    """All checks in one line."""
    counts = Counter(check.verdict for check in found.checks)
    text = ", ".join(
        f"{counts[word]} {VERDICT_WORDS[word]}" for word in VERDICT_WORDS if counts[word]
    )
    openings = {"regressed": "Regression", "inconclusive": "Can't tell"}
    return f"{openings.get(found.verdict, 'Passed')}: {text}."


def _value(check: Check, value: float) -> str:
    if check.quantity == "speedup":
        return f"{value:.3f}x"
    if check.quantity == "nodes":
        return f"{100 * (value - 1):+.3g} %"
    if check.scale == "ratio":
        return f"{100 * (value - 1):+.1f} %"
    if check.quantity in ("kl_divergence", "embedding_cosine", "rank_agreement") or _is_loss(check):
        return significant(value, 3)
    sign = "+" if check.quantity == "task" else ""
    return f"{100 * value:{sign}.1f} %"


def _amount(check: Check, value: float) -> str:
    if check.quantity in _UNITS:
        return milliseconds(value) + _UNITS[check.quantity]
    if check.quantity == "nodes":
        return f"{value:,.0f}"
    if check.quantity in ("size", "memory"):
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value:,.0f} B"
    if check.quantity in ("task", "top1_agreement") and not _is_loss(check):
        return f"{100 * value:.1f} %"
    return significant(value)


def _is_loss(check: Check) -> bool:
    """Whether a task's score is no share of right answers."""
    return check.quantity == "task" and check.better == "lower"
