"""Tables of costs, scores, depths and sweeps that nobody measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from exporter.artifacts import (
    CalibrationRef,
    DepthCell,
    DepthDamage,
    DepthInt8,
    DepthsReport,
    ImportanceReport,
    Interval,
    ModelRef,
    PlannedDeletion,
    Score,
    Speedup,
    SweepCell,
    SweepFailure,
    SweepReport,
    SweepResult,
    SweepShape,
    TaskResult,
)
from exporter.choose.budgets.target_speedup import Stopwatch
from exporter.choose.costs.table import CostTable, RequestShape, SublayerCost
from graph_passes.types import Replacement
from tests.made_reports import made_environment


def make_times(patch: pytest.MonkeyPatch, saved: Mapping[str, float], at: str) -> list[Path]:
    """Has each sublayer of three layers save so much by replacement; gives the graphs asked of."""
    graphs: list[Path] = []
    names: Any = [(layer, kind) for layer in range(3) for kind in ("attention", "mlp")]

    def costs(self: Any) -> CostTable:
        graphs.append(self.onnx)
        return made_table(dict.fromkeys(names, saved), at=RequestShape.parse(at))

    def speedup(self: Any, walk: Any) -> Speedup:
        ratio = 100 / (100 - sum(saved[how] for how in walk.choices.values()))
        return Speedup(ratio=ratio, ci95=(ratio, ratio))

    patch.setattr(Stopwatch, "costs", costs)
    patch.setattr(Stopwatch, "speedup", speedup)
    return graphs


def made_table(
    saved_ms: Mapping[tuple[int, str], Mapping[Replacement, float]],
    *,
    baseline_ms: float = 100.0,
    at: RequestShape | None = None,
) -> CostTable:
    """A table of savings that simply add up."""
    costs: Any = [
        SublayerCost(layer=layer, kind=kind, saved_ms=dict(own))  # type: ignore[arg-type]
        for (layer, kind), own in saved_ms.items()
    ]
    return CostTable(
        at=at or RequestShape(), backend="onnxruntime", provider="CPUExecutionProvider",
        environment=made_environment(), baseline_ms=baseline_ms, sublayers=costs,
    )  # fmt: skip


FIRST = [0.9, 0.2, 0.1, 0.4, 0.5, 0.3]
SECOND = [0.8, 0.1, 0.2, 0.3, 0.6, 0.4]
THIRD = [0.7, 0.1, 0.2, 0.4, 0.5, 0.3]


def scores_of(
    values: Sequence[float], kind: Any = "attention", std_error: float | None = None
) -> list[Score]:
    return [Score(layer=n, kind=kind, score=v, std_error=std_error) for n, v in enumerate(values)]


def write_scores(
    path: Path,
    values: Sequence[float],
    *,
    model: str = "run/checkpoint-1",
    sha: str = "a",
    text: str = "pydoc (calibration half, Python 3.11)",
    samples: int = 4,
    architecture: str = "A",
    std_error: float | None = None,
) -> Path:
    """An importance.json; ``sha`` tells the models apart."""
    ref = CalibrationRef(
        source=text, samples=samples, sequence_length=8, tokens=8 * samples,
        sha256=f"{len(text):02x}" * 32,
    )  # fmt: skip
    mlp = [value * 2 for value in reversed(values)]
    return ImportanceReport(
        model=ModelRef(
            source=model, architecture=architecture, num_layers=len(values), sha256=sha * 64
        ),
        metric="cosine",
        calibration=ref,
        scores=[*scores_of(values, std_error=std_error), *scores_of(mlp, "mlp")],
    ).write(path)


def training(folder: Path) -> list[Path]:
    """Three checkpoints on one text, in the order of their steps."""
    return [
        write_scores(folder / f"{step}.json", values, model=f"run/checkpoint-{step}", sha=sha)
        for step, values, sha in ((200, FIRST, "a"), (1000, SECOND, "b"), (3000, THIRD, "c"))
    ]


_WAYS: dict[Any, tuple[Any, ...]] = {
    "attention": ("attention",), "mlp": ("mlp",), "block": ("block",),
    "joint": ("attention", "mlp"),
}  # fmt: skip


def damage(ratio: float, kl: float) -> DepthDamage:
    return DepthDamage(
        perplexity_ratio=ratio,
        perplexity_ratio_ci95=(ratio * 0.9, ratio * 1.1),
        kl=kl,
        top1_agreement=0.75,
    )


def task(value: float) -> TaskResult:
    return TaskResult(
        task="words", metric="acc", items=12, baseline=0.5, candidate=value,
        difference=Interval(value=value - 0.5, ci95=(value - 0.6, value - 0.4)),
    )  # fmt: skip


def cell(way: Any, number: int, ratio: float, kl: float) -> DepthCell:
    kinds = _WAYS[way]
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
        most_increase=0.02,
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
    first, *rest = (c for c in report.cells if c.way == "attention")
    changes = {"healed": damage(1.012, 0.01), "speedup": 1.06}
    cells = [
        first.model_copy(update=changes),
        *(c.model_copy(update={"not_healed": "There is no product."}) for c in rest),
    ]
    more = {"request": "batch=1,prompt=512,new=64", "backend": "pytorch", "threads": 2}
    best = {} if number is None else {"way": "attention", "number": number}
    faster = Speedup(ratio=1.9, ci95=(1.8, 2.0))
    int8 = [
        DepthInt8(deletions=cut, bytes_removed=0.7, damage=damage(ratio, 0.001), speedup=faster)
        for cut, ratio in (([], 1.005), (first.deletions, 1.017))[: 1 + len(best)]
    ]
    return report.model_copy(
        update={"cells": cells, "fitted_on": report.calibration, "int8": int8, **more, **best}
    )


def made_shape(name: str, ratio: float, **changes: Any) -> SweepShape:
    """A shape that a cell was timed at; ``decode`` or ``prefill``, then its length."""
    results: dict[str, Any] = {
        "name": name,
        "rounds": 12,
        "speedup": Speedup(ratio=ratio, ci95=(ratio - 0.02, ratio + 0.02)),
        "verdict": "faster" if ratio > 1.03 else "inconclusive",
    }
    return SweepShape(**{**results, **changes})


def made_result(ratio: float, perplexity: float, *, scheme: str = "", **changes: Any) -> Any:
    """What a cell found; a quantised one is twice as fast again, and against float."""
    over = {"over_float": Interval(value=2 * ratio, ci95=(1.9 * ratio, 2.1 * ratio))}
    beside = over if scheme else {}
    results: dict[str, Any] = {
        "deletions": [PlannedDeletion(layer=layer, kind="attention") for layer in (5, 6, 22)],
        "shapes": [
            made_shape("prefill 512", ratio + 0.04, **beside),
            made_shape("decode at 512", ratio, **beside),
        ],
        "figures": {
            "perplexity": (14.6, perplexity),
            "kl_divergence": (None, 0.3 if scheme else 0.2),
            "top1_agreement": (None, 0.7 if scheme else 0.8),
        },
        "whole_bytes": 540_000_000,
        "candidate_bytes": 150_000_000 if scheme else 510_000_000,
        "precision": "fp32",
        "machine": "AMD EPYC",
        "threads": 2,
    }
    return SweepResult(**{**results, **changes})


def made_cell(model: str, plan: str, precision: str, result: Any = None, **changes: Any) -> Any:
    """A cell, done where it has a result."""
    results: dict[str, Any] = {
        "model": model,
        "plan": plan,
        "precision": precision,
        "folder": f"cells/{model}/{plan}/{precision}",
        "key": "0" * 64,
        "status": "missing" if result is None else "done",
        "seconds": None if result is None else 60.0,
        "report_sha256": None if result is None else "1" * 64,
        "result": result,
    }
    return SweepCell(**{**results, **changes})


def made_failure(model: str, plan: str, precision: str, message: str = "No such layer.") -> Any:
    """A cell that failed."""
    failure = SweepFailure(error="PlanError", message=message, hint="Take another plan.")
    return made_cell(model, plan, precision, status="failed", failure=failure)


def made_sweep(cells: list[SweepCell]) -> SweepReport:
    """The table of some cells."""
    return SweepReport(
        source="sweep.yaml",
        text="models: [m]\nplans: [attention:5,6,22]\n",
        cells=cells,
    )
