"""What a report says of healing: both domains, the warning, every branch."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.artifacts import (
    AnswerDamage,
    CalibrationRef,
    HealedBranch,
    HealedText,
    Healing,
)
from exporter.heal.domains import warnings_of
from exporter.report.sections.healing import healing_grid, healing_section, healing_words
from tests.made_reports import as_markdown, as_page, gate_report


def damage(increase: float, kl: float = 0.5) -> AnswerDamage:
    return AnswerDamage(
        perplexity=20.0 * 2.718281828**increase,
        log_perplexity_increase=increase,
        log_perplexity_increase_std_error=0.01,
        kl=kl,
        kl_std_error=0.01,
        top1_agreement=0.6,
    )


def text(
    role: Any, before: float, after: float, std_error: float | None = 0.01, kl: float = 0.2
) -> HealedText:
    ref = CalibrationRef(
        source=f"{role} text", samples=4, sequence_length=8, tokens=32, sha256="0" * 64
    )
    return HealedText(
        role=role,
        text=ref,
        baseline_perplexity=20.0,
        dropped=damage(before),
        healed=damage(after, kl=kl),
        gain=before - after,
        gain_std_error=std_error,
    )


def healing(*texts: HealedText, **changes: Any) -> Healing:
    branches = [
        HealedBranch(
            layer=3, kind="attention", replacement="linear", parameters=1100,
            ridge=0.1, bias_explained=0.2, linear_explained=0.8,
        ),
        HealedBranch(layer=4, kind="mlp", replacement="none", parameters=0),
    ]  # fmt: skip
    return Healing(
        asked="best", rank=4, calibration=[texts[0].text], branches=branches,
        parameters=1100, texts=list(texts), warnings=warnings_of(texts), **changes,
    )  # fmt: skip


BOTH = healing(text("calibration", 0.6, 0.1), text("other", 0.5, 0.2))
APART = healing(text("calibration", 0.6, 0.1), text("other", 0.5, 0.49))


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        ((0.6, 0.1), (0.5, 0.2), None),
        ((0.6, 0.1), (0.5, 0.49), "disagree: on calibration text"),  # 2 % is none
        ((0.6, 0.1), (0.5, 0.7), "on other text (other domain) -40 %"),  # a loss
        ((0.6, 0.59), (0.5, 0.1), "disagree: on other text"),
        ((0.6, 0.1), (0.5, 0.4), "on other text (other domain) 20 %"),  # 83 % against 20 %
        ((0.6, 0.62), (0.5, 0.52), "in either domain"),
        ((0.6, 0.1), None, "in the calibration's domain only"),
    ],
)
def test_domains_that_disagree_are_warned_of(own: Any, other: Any, told: str | None) -> None:
    texts = [text("calibration", *own)] + ([] if other is None else [text("other", *other)])
    result = warnings_of(texts)
    assert [told in warning for warning in result] == ([] if told is None else [True])


def test_a_gain_within_its_noise_is_none() -> None:
    noisy = text("other", 0.5, 0.3, std_error=0.2)
    texts = warnings_of([text("calibration", 0.6, 0.1), noisy])
    assert len(texts) == 1
    assert "on other text (other domain) (+0.200 ± 0.200 nats)" in texts[0]
    both = warnings_of([text("calibration", 0.6, 0.4, std_error=0.2), noisy])
    assert "on calibration text (held out) (+0.200 ± 0.200 nats) and on other text" in both[0]
    lost = text("calibration", 0.6, 0.9)
    assert "in either domain" in warnings_of([lost, noisy])[0]
    sure = text("other", 0.5, 0.3, std_error=0.02)
    assert warnings_of([text("calibration", 0.6, 0.1), sure]) == []


def test_answers_that_are_further_away_are_no_gain() -> None:
    """A text may become likelier by chance while the model answers otherwise than the whole one."""
    own = text("calibration", 0.6, 0.1)
    for std_error in (0.01, 0.2):
        further = text("other", 0.5, 0.2, std_error, kl=0.8)
        result = warnings_of([own, further])[0]
        assert "disagree" in result
        assert "on other text (other domain) 60 % (and KL rises from 0.5 to 0.8 nats)" in result
    assert warnings_of([own, text("other", 0.5, 0.2, kl=0.4)]) == []


def test_the_rows_have_both_texts_and_what_was_taken_back() -> None:
    rows = healing_grid(BOTH).rows
    assert [row[1] for row in rows] == ["perplexity", "KL, nats", "same top-1"] * 2
    assert rows[0][-1] == "+0.500 nats ± 0.010 (83 %)"
    assert rows[3][-1] == "+0.300 nats ± 0.010 (60 %)"
    assert healing_words(BOTH) == "1 replaced (1 linear), 1 left without; 1,100 numbers added"


def test_what_was_folded_and_what_was_replaced_are_both_told() -> None:
    folded = BOTH.model_copy(update={"asked": "fold", "changed_weights": 3})
    assert healing_words(folded).startswith("3 weights changed, 1 replaced (1 linear), 1 left")
    alone = [branch.model_copy(update={"replacement": "none"}) for branch in BOTH.branches]
    bare = folded.model_copy(update={"branches": alone})
    assert healing_words(bare).startswith("3 weights changed, 1,100 numbers")
    for item, entry, untold in (
        (folded, "replacements fitted beside them", "no kept weight"),
        (bare, "Folded by least squares", "beside them"),
        (folded.model_copy(update={"changed_weights": 0}), "no kept weight", "Folded by"),
    ):
        shown = as_markdown(gate_report(healing=item))
        assert entry in shown
        assert untold not in shown


def test_reports_show_the_part_and_its_warning() -> None:
    bare = gate_report()
    assert healing_section(bare) is None
    for item in (BOTH, APART):
        report = bare.model_copy(update={"healing": item})
        for written in (as_markdown(report), as_page(report)):
            assert "calibration text" in written
            assert "attention 3" in written
            assert ("The domains disagree" in written) == (item is APART)
    assert "held out" not in as_markdown(bare)
