"""`depthcut export`: load, score, plan, export, prune, verify, measure, report.

Each stage is skipped when its result is already there, made from the same inputs.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import (
    Arms,
    ComparisonReport,
    ImportanceReport,
    ParityCheck,
    PlannedDeletion,
    PruneReport,
    PruningPlan,
    library_versions,
)
from exporter.errors import PlanError, UsageError, VerificationError
from exporter.files import sha256_file, staged_directory, write_text
from exporter.ledger import StageLedger, locked
from exporter.progress import QUIET, Progress
from exporter.request import ExportRequest

if TYPE_CHECKING:
    from exporter.model_source import LoadedModel

_WEIGHT_FILES = ("model.onnx", "model.onnx.data")
_RESULTS = (
    "importance.json", "plan.json", "baseline", "candidate", "prune.json", "report.json",
    "report.md",
)  # fmt: skip


def export_model(request: ExportRequest, progress: Progress = QUIET) -> ComparisonReport:
    """Walks the whole road and returns the comparison.

    Afterwards ``request.out`` holds importance.json, plan.json, baseline/, candidate/,
    prune.json, report.json and report.md, all of this run. When it fails or is cut short, the
    folder holds what it held before, and the next run finds the stages that were finished.

    Raises:
        DepthcutError: The subclass of the stage that failed.
    """
    road = _Road(request, progress)
    with locked(request.out):
        return road.walk()


class _Road:
    """One run: the request, the ledger of finished stages, and the model once it is needed."""

    def __init__(self, request: ExportRequest, progress: Progress) -> None:
        self._request = request
        self._progress = progress
        self._versions = {**library_versions(), "python": platform.python_version()}
        self._refuse_bad_options()
        self._source_sha256 = self._hash_source()
        self._ledger = StageLedger(request.out, force=request.force)
        if self._ledger.is_new:
            _refuse_foreign_results(request.out)

    def walk(self) -> ComparisonReport:
        self._stage("score", self._score_key(), self._score)
        self._refuse_calibration_text()
        self._stage("plan", self._plan_key(), self._plan)
        self._stage("export", self._export_key(), self._export)
        self._stage("prune", self._prune_key(), self._prune)
        self.__dict__.pop("_loaded", None)  # Frees the PyTorch model before anything is timed.
        self._stage("measure", self._measure_key(), self._measure)
        self._ledger.publish()
        return ComparisonReport.read(self._request.out / "report.json")

    def _refuse_bad_options(self) -> None:
        """Fails now, not after minutes of work, on what can be told without the model."""
        from exporter.backends.onnxruntime import check_provider
        from exporter.compare import evaluation_text
        from exporter.optional import require
        from exporter.planning import read_plan

        require("torch", extra="torch")
        check_provider(self._request.compare.provider)
        if self._request.exporter == "optimum":
            require("optimum.exporters.onnx", extra="optimum")
        if self._request.drops.plan is not None:
            read_plan(self._request.drops.plan)
        evaluation_text(self._request.compare, None)

    def _refuse_calibration_text(self) -> None:
        from exporter.compare import evaluation_text

        evaluation_text(self._request.compare, self._importance().calibration)

    def _hash_source(self) -> str:
        from exporter.model_source import source_sha256

        load = self._request.load
        return source_sha256(
            self._request.source,
            revision=load.revision,
            allow_pickle=load.allow_pickle,
            trust_remote_code=load.trust_remote_code,
        )

    def _stage(
        self, name: str, key: dict[str, Any], make: Callable[[], tuple[list[Path], Any]]
    ) -> None:
        if self._ledger.valid(name, key):
            self._progress.say(f"{name}: reused, nothing it depends on has changed")
            return
        self._progress.detail(f"{name}: begins")
        files, notes = make()
        self._ledger.record(name, key, files, notes)

    @cached_property
    def _loaded(self) -> LoadedModel:
        from exporter.model_source import load_model

        options = self._request.load
        with self._progress.task(f"load {self._request.source}"):
            return load_model(
                self._request.source,
                dtype=options.dtype,
                trust_remote_code=options.trust_remote_code,
                allow_pickle=options.allow_pickle,
                revision=options.revision,
            )

    # What each stage depends on. A data set of the hub is taken as unchanged.

    def _score_key(self) -> dict[str, Any]:
        return {
            "model": self._source_sha256,
            "load": vars(self._request.load),
            "score": vars(self._request.score),
            "text": _file_hash(self._request.score.calibration),
            "versions": self._versions,
        }

    def _plan_key(self) -> dict[str, Any]:
        drops = self._request.drops
        return {
            "importance": self._ledger.files_hash("score"),
            "drops": {name: value for name, value in vars(drops).items() if name != "plan"},
            "file": None if drops.plan is None else sha256_file(drops.plan),
        }

    def _export_key(self) -> dict[str, Any]:
        return {
            "model": self._source_sha256,
            "load": vars(self._request.load),
            "exporter": self._request.exporter,
            "opset": self._request.opset,
            "versions": self._versions,
        }

    def _prune_key(self) -> dict[str, Any]:
        return {
            "baseline": self._ledger.files_hash("export"),
            "plan": self._ledger.files_hash("plan"),
            "versions": self._versions,
        }

    def _measure_key(self) -> dict[str, Any]:
        from exporter.measure.environment import default_threads, gpu_name, processor_name

        return {
            "candidate": self._ledger.files_hash("prune"),
            "baseline": self._ledger.files_hash("export"),
            "options": vars(self._request.compare),
            "text": _file_hash(self._request.compare.eval_text),
            "calibration": self._ledger.files_hash("score"),
            "machine": [processor_name(), default_threads(), gpu_name()],
            "versions": self._versions,
        }

    # The stages. Each returns its files, in the workplace, and what is worth remembering.

    def _score(self) -> tuple[list[Path], None]:
        from exporter.importance import score

        report = score(self._loaded, **vars(self._request.score), progress=self._progress)
        return [report.write(self._ledger.work / "importance.json")], None

    def _plan(self) -> tuple[list[Path], None]:
        from exporter.planning import read_plan, validate_plan

        path, given = self._ledger.work / "plan.json", self._request.drops.plan
        plan = self._chosen_plan() if given is None else read_plan(given)
        _refuse_replacements(plan, given)
        layers = self._importance().model.num_layers
        validate_plan(plan, layers, model=self._request.source, path=given)
        self._progress.say("plan: drop " + plan.describe())
        if given is None:
            plan.write(path)
        else:  # The user's own, to the letter.
            write_text(path, given.read_text(encoding="utf-8"))
        return [path], None

    def _chosen_plan(self) -> PruningPlan:
        from exporter.planning import plan_drop

        counts = {name: n for name, n in vars(self._request.drops).items() if name != "plan"}
        return plan_drop(
            self._importance(),
            **counts,
            importance_sha256=sha256_file(self._ledger.path("importance.json")),
            progress=self._progress,
        )

    def _export(self) -> tuple[list[Path], list[dict[str, Any]]]:
        from exporter.model_source import save_pretrained_files
        from exporter.parity import check_export

        folder = self._ledger.work / "baseline"
        with staged_directory(folder) as stage:
            model = self._exported(stage)
            save_pretrained_files(self._loaded, stage)
            checks = check_export(self._loaded, model, progress=self._progress)
            self._judge("baseline against PyTorch", checks)
        return _files_below(folder), [check.model_dump() for check in checks]

    def _exported(self, stage: Path) -> Path:
        opset = self._request.opset
        if self._request.exporter == "optimum":
            from exporter.optimum_export import export_with_optimum

            return export_with_optimum(self._loaded, stage, opset=opset, progress=self._progress)
        from exporter.torch_export import export_onnx

        return export_onnx(self._loaded, stage, opset=opset or 20, progress=self._progress)

    def _prune(self) -> tuple[list[Path], list[dict[str, Any]]]:
        from exporter.parity import check_export
        from exporter.surgery import prune_file

        baseline, folder = self._ledger.path("baseline"), self._ledger.work / "candidate"
        deletions = self._deletions()
        with staged_directory(folder) as stage:
            weights = shutil.ignore_patterns(*_WEIGHT_FILES)
            shutil.copytree(baseline, stage, ignore=weights, dirs_exist_ok=True)
            report = prune_file(
                baseline / "model.onnx",
                stage / "model.onnx",
                deletions,
                plan_sha256=sha256_file(self._ledger.path("plan.json")),
                verify="oracle",
                progress=self._progress,
            )
            self._say_pruned(report)
            checks = check_export(
                self._loaded, stage / "model.onnx", deletions=deletions, progress=self._progress
            )
            self._judge("candidate against PyTorch with the same modules skipped", checks)
        files = [*_files_below(folder), report.write(self._ledger.work / "prune.json")]
        return files, [check.model_dump() for check in checks]

    def _measure(self) -> tuple[list[Path], None]:
        from exporter.compare import compare
        from exporter.report.markdown import render

        importance, deletions = self._importance(), self._deletions()
        report = compare(
            self._ledger.path("baseline"),
            self._ledger.path("candidate"),
            self._request.compare,
            parity=[*self._parity_notes("export"), *self._parity_notes("prune")],
            plan=deletions,
            calibration=importance.calibration,
            progress=self._progress,
        )
        report = self._published(report)
        write_text(self._ledger.work / "report.md", render(report, importance))
        paths = [report.write(self._ledger.work / "report.json"), self._ledger.work / "report.md"]
        return paths, None

    def _published(self, report: ComparisonReport) -> ComparisonReport:
        """The report with its arms' paths as they will be once everything is in its place."""
        baseline, candidate = (
            arm.model_copy(update={"path": str(self._request.out / name / "model.onnx")})
            for name, arm in (
                ("baseline", report.arms.baseline),
                ("candidate", report.arms.candidate),
            )
        )
        return report.model_copy(update={"arms": Arms(baseline=baseline, candidate=candidate)})

    def _importance(self) -> ImportanceReport:
        return ImportanceReport.read(self._ledger.path("importance.json"))

    def _deletions(self) -> list[PlannedDeletion]:
        return PruningPlan.read(self._ledger.path("plan.json")).deletions

    def _parity_notes(self, stage: str) -> list[ParityCheck]:
        """What a stage's check against PyTorch gave, named after the model that was checked."""
        arm = {"export": "baseline", "prune": "candidate, modules skipped"}[stage]
        checks = [ParityCheck.model_validate(note) for note in self._ledger.notes(stage)]
        return [check.model_copy(update={"name": f"{check.name} ({arm})"}) for check in checks]

    def _judge(self, what: str, checks: list[ParityCheck]) -> None:
        """Tells how the checks went, and raises when one did not hold."""
        for check in checks:
            verdict = "holds" if check.passed else "DOES NOT HOLD"
            self._progress.say(
                f"{what}, {check.phase}, {check.name.partition(' against')[0]}: {verdict}, "
                f"max error {check.max_abs_error:.1e} (tolerance {check.tolerance:.1e})"
            )
        failed = [check for check in checks if not check.passed]
        if failed:
            raise VerificationError(
                f"{what}: {failed[0].name} differs by {failed[0].max_abs_error:.2e}, "
                f"more than {failed[0].tolerance:.2e}. The result is not kept.",
                "Try another --opset or --exporter.",
            )

    def _say_pruned(self, report: PruneReport) -> None:
        before, after = report.before, report.after
        self._progress.say(
            f"prune: {before.nodes} -> {after.nodes} nodes, "
            f"{before.parameters / 1e6:.1f} -> {after.parameters / 1e6:.1f} million parameters"
        )


def _refuse_foreign_results(out: Path) -> None:
    for name in _RESULTS:
        if (out / name).exists():
            raise UsageError(
                f"{out / name} is there and was not written by depthcut export.",
                "Use another output folder.",
            )


def _refuse_replacements(plan: PruningPlan, path: Path | None) -> None:
    """PyTorch, which the result is held against, can only skip sublayers."""
    replaced = [deletion for deletion in plan.deletions if deletion.replacement != "none"]
    if replaced:
        raise PlanError(
            f"{path}: {replaced[0].kind} {replaced[0].layer} is to be replaced "
            f"({replaced[0].replacement}), which depthcut export can't do.",
            "Export the model first, and cut its ONNX file: depthcut prune --plan.",
        )


def _file_hash(source: str | None) -> str | None:
    """The hash of a text or plan that is a file; None for a name such as ``pydoc``."""
    if source is None or not Path(source).is_file():
        return None
    return sha256_file(Path(source))


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
