"""What a cell's comparison says, in brief."""

from __future__ import annotations

from exporter.artifacts import (
    AgainstFloat,
    ComparisonReport,
    Corner,
    LatencyRow,
    SweepResult,
    SweepShape,
)
from exporter.report.sections.verdict import notices
from exporter.report.words import short_shape


def result_of(report: ComparisonReport) -> SweepResult:
    """The figures of a cell's report that the sweep's table has."""
    before, after = report.arms.baseline, report.arms.candidate
    accuracy = report.accuracy
    return SweepResult(
        deletions=report.plan,
        shapes=[_shape(row, report) for row in report.latency],
        perplexity=accuracy.perplexity if accuracy else None,
        kl_divergence=accuracy.kl_divergence if accuracy else None,
        top1_agreement=accuracy.top1_agreement if accuracy else None,
        baseline_bytes=before.file_bytes,
        candidate_bytes=after.file_bytes,
        baseline_parameters=before.parameters,
        candidate_parameters=after.parameters,
        baseline_kv_bytes_per_token=before.kv_cache_bytes_per_token,
        candidate_kv_bytes_per_token=after.kv_cache_bytes_per_token,
        against_float=_against_float(report),
        precision=after.precision,
        machine=report.environment.gpu or report.environment.processor,
        threads=report.environment.threads,
        notices=notices(report),
    )


def _against_float(report: ComparisonReport) -> AgainstFloat | None:
    whole = _corner(report, pruned=False, quantized=False)
    cut = _corner(report, pruned=True, quantized=True)
    if whole is None or cut is None:
        return None
    return AgainstFloat(
        whole_bytes=whole.file_bytes,
        whole_perplexity=whole.perplexity,
        kl_divergence=cut.kl_divergence,
        top1_agreement=cut.top1_agreement,
    )


def _shape(row: LatencyRow, report: ComparisonReport) -> SweepShape:
    cut = _corner(report, pruned=True, quantized=True)
    return SweepShape(
        name=short_shape(row),
        phase=row.phase,
        batch=row.batch,
        sequence_length=row.sequence_length,
        past_length=row.past_length,
        new_tokens=row.new_tokens,
        rounds=row.rounds,
        baseline_ms=row.baseline.median_ms,
        candidate_ms=row.candidate.median_ms,
        speedup=row.speedup,
        verdict=row.verdict,
        over_float=cut.speedups.get(row.shape_name) if cut else None,
    )


def _corner(report: ComparisonReport, *, pruned: bool, quantized: bool) -> Corner | None:
    wanted = (pruned, quantized)
    return next((c for c in report.corners if (c.pruned, c.quantized) == wanted), None)
