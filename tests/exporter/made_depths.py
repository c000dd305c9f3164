"""A report of pruning at several depths, with a cell that can't be and a task."""

from __future__ import annotations

from typing import Any

from exporter.artifacts import (
    CalibrationRef,
    DepthCell,
    DepthDamage,
    DepthsReport,
    DropAnswer,
    Interval,
    ModelRef,
    PlannedDeletion,
    TaskResult,
)

KINDS: dict[Any, tuple[Any, ...]] = {
    "attention": ("attention",), "mlp": ("mlp",), "block": ("block",),
    "joint": ("attention", "mlp"),
}  # fmt: skip


def damage(ratio: float, kl: float) -> DepthDamage:
    return DepthDamage(
        perplexity=20 * ratio,
        perplexity_ratio=ratio,
        perplexity_ratio_ci95=(ratio * 0.9, ratio * 1.1),
        kl=kl,
        kl_ci95=(kl * 0.8, kl * 1.2),
        top1_agreement=0.75,
    )


def task(value: float) -> TaskResult:
    return TaskResult(
        task="words", metric="acc", items=12, baseline=0.5, candidate=value,
        difference=Interval(value=value - 0.5, ci95=(value - 0.6, value - 0.4)),
    )  # fmt: skip


def cell(way: Any, number: int, ratio: float, kl: float) -> DepthCell:
    kinds = KINDS[way]
    deletions = [PlannedDeletion(layer=n, kind=kinds[n % len(kinds)]) for n in range(number)]
    return DepthCell(
        way=way, number=number, deletions=deletions, parameters_removed=0.01 * number,
        damage=damage(ratio, kl), tasks=[task(0.5 - 0.1 * number)],
    )  # fmt: skip


def made_depths(text: str = "held-out.txt") -> DepthsReport:
    """Attention and Joint Layer Drop are alike at 1; Block Drop of 2 can't be."""
    ref = CalibrationRef(source=text, samples=4, sequence_length=8, tokens=32, sha256="1" * 64)
    return DepthsReport(
        model=ModelRef(source="model", architecture="A", num_layers=2, sha256="a" * 64),
        metric="cosine",
        calibration=ref.model_copy(update={"source": "pydoc"}),
        text=ref,
        baseline_perplexity=20.0,
        cells=[
            cell("attention", 1, 1.1, 0.02), cell("attention", 2, 1.5, 0.2),
            cell("mlp", 1, 1.3, 0.1), cell("mlp", 2, 3.0, 0.9),
            cell("block", 1, 1.6, 0.3),
            DepthCell(way="block", number=2, refused="The plan drops everything."),
            cell("joint", 1, 1.1, 0.02), cell("joint", 2, 1.4, 0.15),
        ],
    )  # fmt: skip


def made_answer(number: int | None = 1) -> DepthsReport:
    """Attention Drop of 1 is recommended, healed; or nothing is."""
    report = made_depths()
    more = {"speedups": {"prefill": 1.09, "decode": 1.04, "request": 1.06}}
    healed = {"healed": damage(1.012, 0.01), "other_healed": damage(1.034, 0.02)}
    first, *rest = (c for c in report.cells if c.way == "attention")
    cells = [
        first.model_copy(update={"other": damage(1.2, 0.04), **healed, **more}),
        *(c.model_copy(update={"not_healed": "There is no product.", **more}) for c in rest),
    ]
    answer = DropAnswer(
        other_text=report.text.model_copy(update={"source": "self (text, seed 1)"}),
        other_baseline_perplexity=7.25,
        fitted_on=report.calibration,
        most_increase=0.02,
        request="batch=1,prompt=512,new=64",
        backend="pytorch",
        threads=2,
        way=None if number is None else "attention",
        number=number,
    )
    return report.model_copy(update={"cells": cells, "answer": answer})
