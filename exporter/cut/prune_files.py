"""Which files a cut reads and writes, and which it must not touch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Literal

from exporter.artifacts import PruneReport
from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.cut.options import CutOptions
from exporter.engines.usage import stage_graph_use
from exporter.errors import ArtifactError, SurgeryError, UsageError
from exporter.files import refuse_overwriting, sha256_file, sha256_files
from exporter.models.genai_config import CONFIG_FILE, GenaiConfig, config_target, find_config
from exporter.models.sentence_folder import stage_companions
from graph_passes.files import storage
from graph_passes.files.kinds import ONNX, refuse_foreign

if TYPE_CHECKING:
    import onnx_ir as ir

REPORT = "prune.json"


@dataclass(frozen=True)
class PruneFiles:
    """The files of one cut."""

    source: Path
    data: tuple[Path, ...]
    target: Path
    weights: Literal["compact", "share"]
    report: Path | None  # None: none is written
    genai: GenaiConfig | None  # beside the source; None: there is none, or it is left alone
    companions: bool = True

    @classmethod
    def choose(
        cls, source: Path, model: ir.Model, target: Path, plan: LoadedPlan, options: CutOptions
    ) -> PruneFiles:
        """Names the files of a cut of ``model``, which was read from ``source``."""
        if not target.name or target.is_dir():
            raise SurgeryError(
                f"{target} is a folder.",
                "Name a file in it, such as pruned.onnx.",
                code="is-a-folder",
            )
        report = _own_report(target) if options.reports else None
        genai = find_config(source) if options.genai_config == "rewrite" else None
        data = tuple(storage.data_files(model))
        files = cls(source, data, target, options.weights, report, genai, options.companions)
        inputs = [source, *data, *plan.inputs, *([genai.path] if genai else [])]
        for file in filter(None, [target, report, files.genai_target]):
            refuse_overwriting(file, inputs)
        storage.refuse_collision(model, target, options.weights)
        refuse_foreign(target, ONNX)
        return files

    @property
    def all(self) -> list[Path]:
        """Every file but the config of onnxruntime-genai."""
        return [self.source, *self.data, self.target, *filter(None, [self.report])]

    @property
    def genai_target(self) -> Path | None:
        """Where onnxruntime-genai's config of the result goes; None where it gets none."""
        return config_target(self.source, self.target) if self.genai else None

    @property
    def genai_advice(self) -> str:
        """What is still to do before onnxruntime-genai runs the result."""
        config = self.genai_target
        if config is None or config.name == CONFIG_FILE:
            return f"onnxruntime-genai: {CONFIG_FILE} is rewritten for the result"
        return (
            f"onnxruntime-genai: {config.name} is the result's config; copy it with the result and "
            f"its tokenizer to a folder of their own, as {CONFIG_FILE}"
        )

    @property
    def stale_reports(self) -> list[Path]:
        """Reports of an earlier cut of this name that this one's does not replace."""
        return [path for path in stale_reports(self.target) if path != self.report]

    @property
    def shares_data(self) -> bool:
        """Whether the result points into the source's data files."""
        return self.weights == "share" and bool(self.data)

    def stage_companions(self, stage: Path) -> list[tuple[Path, Path]]:
        """Stages what the source ships with, and how the result is used, if that is asked for."""
        moves = stage_companions(self.source, self.target, stage) if self.companions else []
        moves += stage_graph_use(self.target, stage) if self.companions else []
        return [(staged, final) for staged, final in moves if final not in self.all]


class SourceHashes:
    """Hashes the source's files while the surgery goes on; abandoned when it fails.

    With shared weights the data files aren't hashed: the result points to the very same ones,
    and reading them would take longer than everything else.
    """

    def __init__(self, source: Path, data: Sequence[Path]) -> None:
        self._graph = sha256_file(source)
        self._weights: Future[str] | None = None
        if data:
            self._weights = Future()
            arguments = (self._weights, data, source.parent)
            Thread(target=_hash_into, args=arguments, daemon=True).start()

    def wait(self) -> dict[str, str]:
        """Role to hash, once that of the weights is there."""
        texts = {"model": self._graph}
        if self._weights is not None:
            texts["weights"] = self._weights.result()
        return texts


def _hash_into(future: Future[str], files: Sequence[Path], root: Path) -> None:
    try:
        future.set_result(sha256_files(files, root))
    except BaseException as error:  # handed to the one who waits
        future.set_exception(error)


def stale_reports(target: Path) -> list[Path]:
    """The reports of an earlier cut that stood in a place where something else will stand."""
    if not target.is_file():  # then they were put there for what comes
        return []
    return [path for path in _report_places(target) if _tells_of(path, target.name)]


def _report_places(target: Path) -> tuple[Path, Path]:
    """Where the report of a result is, beside it: the second where another's is the first."""
    return target.with_name(REPORT), target.with_name(f"{target.name}.{REPORT}")


def _tells_of(path: Path, name: str) -> bool:
    try:
        return path.exists() and PruneReport.read(path).target == name
    except (ArtifactError, UsageError):
        return False


def _own_report(target: Path) -> Path:
    """The place for a result's report; that of another model, if it is still there, stays."""
    usual, own = _report_places(target)
    described = _described(usual)
    taken = described not in ("", target.name) and (usual.parent / described).exists()
    return own if taken else usual


def _described(path: Path) -> str:
    """The model that the report at a path speaks of; empty where nothing is there."""
    if not path.exists():
        return ""
    try:
        return PruneReport.read(path).target
    except ArtifactError as error:
        raise SurgeryError(
            f"{path} is there already and is no report of a cut.",
            "Write the result to another folder.",
            code="not-ours",
        ) from error
