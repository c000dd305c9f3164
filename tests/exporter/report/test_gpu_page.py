"""The page of a GPU session and what it holds against what is known, on made-up results."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.artifacts import (
    GpuCard,
    GpuCheck,
    GpuFinding,
    GpuLargest,
    GpuSession,
    GpuStep,
    GpuTests,
    GpuTime,
)
from exporter.pipeline.gpu.known import findings
from exporter.report.markdown import markdown
from exporter.report.sections.gpu_session import session_document

CARD = GpuCard(
    name="A card", compute_capability="sm99", memory_bytes=10**10, cuda_version="13.0",
    peak_bytes_per_s=1e12, copy_bytes_per_s=8e11,
)  # fmt: skip


def timed(subject: str, arm: str, median_ms: float, **facts: Any) -> GpuTime:
    told = {"phase": "decode", "batch": 1, "sequence_length": 1, **facts}
    return GpuTime(subject=subject, arm=arm, median_ms=median_ms, samples_ms=[median_ms], **told)


def largest(arm: str, tokens_per_s: float, **facts: Any) -> GpuLargest:
    told = {"layers": 20, "of_layers": 80, "fits_not": 13, "batch_with_both": 11, **facts}
    return GpuLargest(
        subject="A model", arm=arm, batch=12, prompt=7, new=9, prefill_s=1, decode_s=1,
        tokens_per_s=tokens_per_s, weights_bytes=1, cache_bytes=1, **told,
    )  # fmt: skip


def step(name: str, *, rehearsal: bool = False, **found: Any) -> GpuStep:
    return GpuStep(name=name, title=name, rehearsal=rehearsal, status="done", **found)


def session(*steps: GpuStep) -> GpuSession:
    found = findings(steps)
    return GpuSession(rehearsal=steps[0].rehearsal, steps=list(steps), findings=found)


def page(*steps: GpuStep) -> str:
    return markdown(session_document(session(*steps)))


def finding(found: list[GpuFinding], what: str) -> GpuFinding:
    (one,) = (each for each in found if what in each.what)
    return one


@pytest.mark.parametrize(
    ("what", "name", "good", "bad"),
    [
        (
            "tests",
            "tests",
            {"tests": GpuTests(passed=3, failed=0, skipped=1)},
            {"tests": GpuTests(passed=3, failed=1, skipped=1, failures=["a"])},
        ),
        (
            "told by a mask",
            "attention",
            {"times": [timed("attention", "mask", 1, past_length=past) for past in (1, 2)]},
            {"times": [timed("attention", "mask", ms, past_length=ms) for ms in (1, 2)]},
        ),
        (
            "step told by lengths",
            "attention",
            {"times": [timed("attention", "lengths", ms, past_length=ms) for ms in (1, 2)]},
            {"times": [timed("attention", "lengths", 1, past_length=past) for past in (1, 2)]},
        ),
        (
            "scratch memory",
            "attention",
            {"times": [timed("attention", "lengths", 1, scratch_bytes=4_500_000)]},
            {"times": [timed("attention", "lengths", 1, scratch_bytes=1_078_000_000)]},
        ),
        (
            "logits of its last",
            "logits",
            {"times": [timed("logits", "last", 1.0), timed("logits", "all", 1.1)]},
            {"times": [timed("logits", "last", 1.2), timed("logits", "all", 1.1)]},
        ),
        (
            "A model without half",
            "8b",
            {"largest": [largest("whole", 100), largest("cut", 150)]},
            {"largest": [largest("whole", 100), largest("cut", 140)]},
        ),
    ],
)
def test_what_is_known_is_held_against_what_was_found(
    what: str, name: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    assert finding(findings([step(name, **good)]), what).agrees is True
    assert finding(findings([step(name, **bad)]), what).agrees is False
    rehearsed = finding(findings([step(name, rehearsal=True, **bad)]), what)
    assert (rehearsed.agrees, rehearsed.found) == (None, "")


@pytest.mark.parametrize(("error", "agrees"), [(0.001, True), (0.2, False), (float("nan"), False)])
def test_answers_agree_within_their_tolerance(error: float, agrees: bool) -> None:
    row = GpuCheck(
        subject="an engine", against="another", phase="decode", largest_error=error, tolerance=0.1
    )
    assert finding(findings([step("numbers", checks=[row])]), "an engine").agrees is agrees


@pytest.mark.parametrize(("median_ms", "agrees"), [(1.2, True), (2.0, False)])
def test_the_bandwidth_is_that_of_a_large_model_s_steps(median_ms: float, agrees: bool) -> None:
    row = timed("A model", "whole", median_ms, least_bytes=10**9)
    steps = [step("doctor", card=CARD), step("8b", times=[row], largest=[largest("whole", 1)])]
    assert finding(findings(steps), "a decode step").agrees is agrees


def test_the_page_tells_the_card_the_ratio_and_what_is_extrapolated() -> None:
    rows = [largest("whole", 1000), largest("cut", 1700)]
    row = timed("A model", "whole", 2.0, least_bytes=10**9)
    text = page(step("doctor", card=CARD), step("70b", times=[row], largest=rows))
    assert "A card" in text.splitlines()[0]
    lines = [line for line in text.splitlines() if "A model" in line]
    assert ["20 of 80" in line and "1,000" in line for line in lines].count(True) == 1
    assert ["extrapolated" in line and "250" in line for line in lines].count(True) == 1
    assert any("1.70" in line for line in lines)
    assert any("50.0 %" in line and "62.5 %" in line for line in lines)


def test_a_rehearsal_s_page_has_the_same_rows_and_none_of_the_numbers() -> None:
    rows = [largest("whole", 1234), largest("cut", 5678)]
    found = {"times": [timed("A model", "whole", 2.5, least_bytes=10**9)], "largest": rows}
    card, told = step("doctor", card=CARD, rehearsal=True), step("70b", rehearsal=True, **found)
    text, measured = page(card, told), page(step("doctor", card=CARD), step("70b", **found))
    for number in ("1,234", "5,678", "4.60", "2.50", "40.0 %", "A card"):
        assert number in measured
        assert number not in text
    assert text.count("| A model") == measured.count("| A model") > 3
