"""`depthcut export`: load, score, plan, export, prune, verify, measure, report.

Each stage is skipped when the output folder already holds its result, made from the same inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exporter.artifacts import (
    ComparisonReport,
    ImportanceReport,
    ParityCheck,
    PruneReport,
    PruningPlan,
    library_versions,
)
from exporter.compare import CompareOptions
from exporter.errors import UsageError, VerificationError
from exporter.files import sha256_file, staged_directory, write_text
from exporter.ledger import StageLedger, locked
from exporter.progress import QUIET, Progress

if TYPE_CHECKING:
    from exporter.model_source import LoadedModel

ExporterName = Literal["torch", "optimum"]
_WEIGHT_FILES = ("model.onnx", "model.onnx.data")


@dataclass(frozen=True)
class SourceOptions:
    """How the PyTorch model may be loaded; both dangers are off by default."""

    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class ScoreOptions:
    """On which text importance is measured; None: the default for the kind of model."""

    calibration: str | None = None
    samples: int | None = None
    sequence_length: int = 512
    batch_size: int = 4
    seed: int = 0


@dataclass(frozen=True)
class DropRequest:
    """What to drop: a number of one kind, a joint number, or a plan file. Exactly one is set."""

    attention: int = 0
    mlp: int = 0
    block: int = 0
    joint: int = 0
    plan: Path | None = None

    def __post_init__(self) -> None:
        counts = (self.attention, self.mlp, self.block, self.joint)
        if sum(count > 0 for count in counts) + (self.plan is not None) != 1:
            raise UsageError(
                "Say what to drop, in one way:",
                "--drop-attn N, --drop-mlp N, --drop-block N, --drop N or --plan FILE.",
            )


@dataclass(frozen=True)
class ExportRequest:
    """Everything that `depthcut export` needs to know.

    Attributes:
        source: Hugging Face folder, hub id or GGUF file.
        out: The folder that takes all results.
        drops: What to drop.
        exporter: PyTorch's own exporter, or optimum's.
        opset: The ONNX opset; None: 20 for PyTorch's exporter, optimum's own choice for optimum.
        force: Redo what is already there.
    """

    source: str
    out: Path
    drops: DropRequest
    exporter: ExporterName = "torch"
    opset: int | None = None
    load: SourceOptions = field(default_factory=SourceOptions)
    score: ScoreOptions = field(default_factory=ScoreOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)
    force: bool = False


def export_model(request: ExportRequest, progress: Progress = QUIET) -> ComparisonReport:
    """Walks the whole road and returns the comparison.

    Afterwards ``request.out`` holds importance.json, plan.json, baseline/, candidate/,
    prune.json, report.json and report.md. A run that is cut short leaves the finished stages.

    Raises:
        DepthcutError: The subclass of the stage that failed.
    """
    with locked(request.out):
        return _Road(request, progress).walk()


class _Road:
    """One run: the request, the ledger of finished stages, and the model once it is needed."""

    def __init__(self, request: ExportRequest, progress: Progress) -> None:
        self._request = request
        self._progress = progress
        self._out = request.out
        self._ledger = StageLedger(request.out, force=request.force)
        self._versions = library_versions()
        if self._ledger.is_new:
            _refuse_foreign_results(request.out)

    def walk(self) -> ComparisonReport:
        self._stage("score", self._score_key(), self._score)
        self._refuse_same_text()
        self._stage("plan", self._plan_key(), self._plan)
        self._stage("export", self._export_key(), self._export)
        self._stage("prune", self._prune_key(), self._prune)
        self.__dict__.pop("_loaded", None)  # Frees the PyTorch model before anything is timed.
        self._stage("measure", self._measure_key(), self._measure)
        return ComparisonReport.read(self._out / "report.json")

    def _refuse_same_text(self) -> None:
        """Fails now, not after the export, when the evaluation text can't be used."""
        from exporter.compare import evaluation_text

        importance = ImportanceReport.read(self._out / "importance.json")
        evaluation_text(self._request.compare, importance.calibration)

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

    # What each stage depends on.

    def _score_key(self) -> dict[str, Any]:
        from exporter.model_source import source_sha256

        calibration, load = self._request.score.calibration, self._request.load
        return {
            "model": source_sha256(
                self._request.source, revision=load.revision, allow_pickle=load.allow_pickle
            ),
            "load": vars(load),
            "score": vars(self._request.score),
            "text": _file_hash(calibration),
            "versions": self._only_versions("depthcut", "torch", "transformers"),
        }

    def _plan_key(self) -> dict[str, Any]:
        drops = self._request.drops
        return {
            "importance": self._ledger.files_hash("score"),
            "drops": vars(drops),
            "file": _file_hash(str(drops.plan) if drops.plan else None),
        }

    def _export_key(self) -> dict[str, Any]:
        names = ("depthcut", "torch", "transformers", "onnxscript", "onnx-ir", "optimum-onnx")
        return {
            "model": self._score_key()["model"],
            "load": vars(self._request.load),
            "exporter": self._request.exporter,
            "opset": self._request.opset,
            "versions": self._only_versions(*names),
        }

    def _prune_key(self) -> dict[str, Any]:
        return {
            "baseline": self._ledger.files_hash("export"),
            "deletions": self._deletions(),
            "versions": self._only_versions("depthcut", "onnx-ir", "torch", "transformers"),
        }

    def _measure_key(self) -> dict[str, Any]:
        return {
            "candidate": self._ledger.files_hash("prune"),
            "baseline": self._ledger.files_hash("export"),
            "options": vars(self._request.compare),
            "text": _file_hash(self._request.compare.eval_text),
            "calibration": self._ledger.files_hash("score"),
            "versions": self._versions,
        }

    def _only_versions(self, *names: str) -> dict[str, str | None]:
        return {name: self._versions.get(name) for name in names}

    # The stages. Each returns its files and what is worth remembering.

    def _score(self) -> tuple[list[Path], None]:
        from exporter.importance import score

        report = score(self._loaded, **vars(self._request.score), progress=self._progress)
        return [report.write(self._out / "importance.json")], None

    def _plan(self) -> tuple[list[Path], None]:
        from exporter.planning import plan_drop, read_plan, validate_plan

        path = self._out / "importance.json"
        importance, drops = ImportanceReport.read(path), self._request.drops
        if drops.plan is not None:
            plan = read_plan(drops.plan)
        else:
            counts = {name: n for name, n in vars(drops).items() if name != "plan"}
            plan = plan_drop(
                importance,
                **counts,
                importance_sha256=sha256_file(path),
                progress=self._progress,
            )
        validate_plan(plan, importance.model.num_layers)
        self._progress.say("plan: drop " + plan.describe())
        return [plan.write(self._out / "plan.json")], None

    def _export(self) -> tuple[list[Path], list[dict[str, Any]]]:
        from exporter.model_source import save_pretrained_files
        from exporter.parity import check_export

        with staged_directory(self._out / "baseline") as stage:
            if self._request.exporter == "optimum":
                from exporter.optimum_export import export_with_optimum

                model = export_with_optimum(
                    self._loaded, stage, opset=self._request.opset, progress=self._progress
                )
            else:
                from exporter.torch_export import export_onnx

                model = export_onnx(
                    self._loaded, stage, opset=self._request.opset or 20, progress=self._progress
                )
            save_pretrained_files(self._loaded, stage)
            checks = check_export(self._loaded, model, progress=self._progress)
            self._judge("baseline against PyTorch", checks)
        return _files_below(self._out / "baseline"), [check.model_dump() for check in checks]

    def _prune(self) -> tuple[list[Path], list[dict[str, Any]]]:
        from exporter.parity import check_export
        from exporter.surgery import prune_file

        plan_path = self._out / "plan.json"
        deletions = PruningPlan.read(plan_path).deletions
        with staged_directory(self._out / "candidate") as stage:
            _copy_all_but_weights(self._out / "baseline", stage)
            report = prune_file(
                self._out / "baseline" / "model.onnx",
                stage / "model.onnx",
                deletions,
                plan_sha256=sha256_file(plan_path),
                verify="oracle",
                progress=self._progress,
            )
            self._say_pruned(report)
            checks = check_export(
                self._loaded, stage / "model.onnx", deletions=deletions, progress=self._progress
            )
            self._judge("candidate against PyTorch with the same modules skipped", checks)
        report.write(self._out / "prune.json")
        files = [*_files_below(self._out / "candidate"), self._out / "prune.json"]
        return files, [check.model_dump() for check in checks]

    def _measure(self) -> tuple[list[Path], None]:
        from exporter.compare import compare
        from exporter.report.importance import render_importance
        from exporter.report.markdown import render

        importance = ImportanceReport.read(self._out / "importance.json")
        deletions = PruningPlan.read(self._out / "plan.json").deletions
        report = compare(
            self._out / "baseline",
            self._out / "candidate",
            self._request.compare,
            parity=[*self._parity_notes("export"), *self._parity_notes("prune")],
            plan=deletions,
            calibration=importance.calibration,
            progress=self._progress,
        )
        report.write(self._out / "report.json")
        text = f"{render(report)}\n{render_importance(importance, deletions)}"
        write_text(self._out / "report.md", text)
        return [self._out / "report.json", self._out / "report.md"], None

    def _parity_notes(self, stage: str) -> list[ParityCheck]:
        """What a stage's check against PyTorch gave, named after the model that was checked."""
        arm = {"export": "baseline", "prune": "candidate, modules skipped"}[stage]
        checks = [ParityCheck.model_validate(note) for note in self._ledger.notes(stage)]
        return [check.model_copy(update={"name": f"{check.name} ({arm})"}) for check in checks]

    def _deletions(self) -> list[dict[str, Any]]:
        plan = PruningPlan.read(self._out / "plan.json")
        return [deletion.model_dump() for deletion in plan.deletions]

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
    for name in ("baseline", "candidate"):
        if (out / name).exists():
            raise UsageError(
                f"{out / name} is there and was not written by depthcut export.",
                "Use another output folder.",
            )


def _file_hash(source: str | None) -> str | None:
    """The hash of a text or plan that is a file; None for a name such as ``pydoc``."""
    if source is None or not Path(source).is_file():
        return None
    return sha256_file(Path(source))


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _copy_all_but_weights(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.name not in _WEIGHT_FILES:
            shutil.copy2(path, target / path.name)
