"""The last stage of `depthcut export`: both models compared, and the report."""

from __future__ import annotations

from pathlib import Path

from exporter.artifacts import Arm, Arms, ComparisonReport, ParityCheck
from exporter.compare.kept import forget
from exporter.compare.session import compare
from exporter.pipeline.run import ENGINES, QUANTIZED, Run
from exporter.report.files import write_reports


def measure(run: Run) -> tuple[list[Path], None]:
    """Compares both models and writes the report."""
    importance, deletions = run.importance, run.plan.plan.deletions
    graphs = run.ledger.path("baseline"), run.ledger.path("candidate")
    arms, floats, built_from = graphs, None, None
    if run.request.engines is not None:
        arms = run.ledger.path(ENGINES) / "baseline", run.ledger.path(ENGINES) / "candidate"
        sources = run.built_from()
        built_from = sources["baseline"], sources["candidate"]
    elif run.request.quantize is not None:
        arms = run.ledger.path(QUANTIZED["baseline"]), run.ledger.path(QUANTIZED["candidate"])
        floats = graphs
    report = compare(
        *arms,
        run.request.compare,
        floats=floats,
        onnx=built_from,
        parity=[*_parity_notes(run, "export"), *_parity_notes(run, "prune")],
        plan=deletions,
        calibration=importance.calibration,
        resume=run.request.out,
        progress=run.progress,
    )
    report = _published(run, report.model_copy(update={"healing": run.healing}))
    paths = write_reports(report, run.ledger.work, importance)
    forget(run.request.out)
    return paths, None


def _published(run: Run, report: ComparisonReport) -> ComparisonReport:
    """The report with its arms' paths as they will be once everything is in its place."""

    def placed(path: str) -> str:
        at = Path(path)
        inside = at.is_relative_to(run.ledger.work)
        return str(run.request.out / at.relative_to(run.ledger.work)) if inside else path

    def moved(arm: Arm) -> Arm:
        engines = [e.model_copy(update={"path": placed(e.path)}) for e in arm.engines]
        return arm.model_copy(update={"path": placed(arm.path), "engines": engines})

    arms = Arms(
        baseline=moved(report.arms.baseline),
        candidate=moved(report.arms.candidate),
        references={name: moved(arm) for name, arm in report.arms.references.items()},
    )
    return report.model_copy(update={"arms": arms})


def _parity_notes(run: Run, stage: str) -> list[ParityCheck]:
    """What a stage's check against PyTorch gave, named after the model that was checked."""
    done = "skipped" if run.plan.replacements is None else "skipped or replaced"
    arm = {"export": "baseline", "prune": f"candidate, modules {done}"}[stage]
    checks = [ParityCheck.model_validate(note) for note in run.ledger.notes(stage)]
    return [check.model_copy(update={"name": f"{check.name} ({arm})"}) for check in checks]
