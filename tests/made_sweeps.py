"""Tables of sweeps that nobody ran."""

from __future__ import annotations

from typing import Any

from exporter.artifacts import (
    AgainstFloat,
    Interval,
    PerplexityPair,
    PlannedDeletion,
    Speedup,
    SweepCell,
    SweepFailure,
    SweepReport,
    SweepResult,
    SweepShape,
)


def made_shape(name: str, ratio: float, **changes: Any) -> SweepShape:
    """A shape that a cell was timed at; ``decode`` or ``prefill``, then its length."""
    phase, _, length = name.partition(" ")
    lengths = {"sequence_length": int(length.split()[-1]), "past_length": 0}
    if phase == "decode":
        lengths = {"sequence_length": 1, "past_length": lengths["sequence_length"]}
    results: dict[str, Any] = {
        "name": name,
        "phase": phase,
        "batch": 1,
        "rounds": 12,
        "baseline_ms": 40.0,
        "candidate_ms": 40.0 / ratio,
        "speedup": Speedup(ratio=ratio, ci95=(ratio - 0.02, ratio + 0.02)),
        "verdict": "faster" if ratio > 1.03 else "inconclusive",
        **lengths,
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
        "perplexity": PerplexityPair(baseline=15.0 if scheme else 14.6, candidate=perplexity),
        "kl_divergence": 0.2,
        "top1_agreement": 0.8,
        "baseline_bytes": 160_000_000 if scheme else 540_000_000,
        "candidate_bytes": 150_000_000 if scheme else 510_000_000,
        "baseline_parameters": 134_500_000,
        "candidate_parameters": 127_400_000,
        "baseline_kv_bytes_per_token": 46_080,
        "candidate_kv_bytes_per_token": 33_792,
        "against_float": AgainstFloat(
            whole_bytes=540_000_000, whole_perplexity=14.6, kl_divergence=0.3, top1_agreement=0.7
        )
        if scheme
        else None,
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
        models=list(dict.fromkeys(cell.model for cell in cells)),
        plans=list(dict.fromkeys(cell.plan for cell in cells)),
        precisions=list(dict.fromkeys(cell.precision for cell in cells)),
        cells=cells,
    )
