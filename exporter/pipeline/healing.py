"""The stage of `depthcut export` that fits what takes the places of what the plan drops."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from exporter.artifacts import HealingReport, PruningPlan
from exporter.artifacts.ledger import FOLDER
from exporter.files import sha256_file, staged_directory
from exporter.heal.options import HealOptions
from exporter.heal.plan_file import FOLDER_REPORT, report_of
from exporter.pipeline.keys import Key, file_hash
from exporter.pipeline.run import HEALED_PLAN, HEALING, Run, files_below
from graph_passes.files.placing import remove_tree

_FITS = "healing-fits"


def heal_key(run: Run, wanted: HealOptions) -> Key:
    """The model, the plan, how it is healed, and the texts."""
    return {
        "model": run.source_sha256,
        "load": vars(run.request.choosing),
        "plan": run.ledger.files_hash("plan"),
        "options": asdict(wanted),
        "texts": [file_hash(text) for text in (*wanted.calibration, wanted.check_text)],
        "versions": run.versions,
    }


def heal(run: Run, wanted: HealOptions) -> tuple[list[Path], None]:
    """Heals the plan; the healed one stands in a folder of its own, with its numbers."""
    from exporter.heal import heal as heal_plan
    from exporter.heal import write_healed_plan
    from exporter.report.sections.healing import healing_words

    path, folder = run.ledger.path("plan.json"), run.ledger.work / HEALING
    plan = PruningPlan.read(path)
    made_from = {"plan": sha256_file(path)}
    work = run.request.out / FOLDER / _FITS  # outlives an interrupted run
    healed = heal_plan(
        run.choosing,
        plan,
        wanted,
        made_from=made_from,
        allow_all=run.request.force,
        work=work,
        progress=run.progress,
    )
    with staged_directory(folder) as stage:
        write_healed_plan(
            stage / HEALED_PLAN,
            healed.plan,
            healed.branch_replacements,
            report=healed.report,
            report_path=stage / FOLDER_REPORT,
        )
    remove_tree(work)
    run.progress.say(f"heal: {healing_words(healed.report.healing)}")
    return files_below(folder), None


def healing_report(run: Run) -> HealingReport | None:
    """What is known of the replacements' gain; None where nothing is put in, or nothing known."""
    path = run.plan_path()
    report = report_of(PruningPlan.read(path), path)
    return None if report is None else HealingReport.read(report)
