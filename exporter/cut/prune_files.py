"""Which files a cut reads and writes, and which it must not touch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from exporter.artifacts import PruneReport
from exporter.artifacts.replacement_file import Replacements
from exporter.cut.genai_result import GenaiResult
from exporter.errors import ArtifactError, SurgeryError, UsageError
from graph_passes.files.locations import real

if TYPE_CHECKING:
    import onnx_ir as ir

_ELSEWHERE = "Name another file for the report (--report), or write the result to another folder."


@dataclass(frozen=True)
class PruneFiles:
    """The files of one cut.

    Attributes:
        source: The ONNX file that is cut.
        data: The data files that its weights lie in.
        target: The result's ONNX file.
        weights: How the result has its weights.
        report: The report's file.
        genai: The config of onnxruntime-genai, where the source has one.
    """

    source: Path
    data: tuple[Path, ...]
    target: Path
    weights: Literal["compact", "share"]
    report: Path
    genai: GenaiResult | None

    @classmethod
    def choose(
        cls,
        source: Path,
        model: ir.Model,
        target: Path,
        report: Path,
        weights: Literal["compact", "share"],
        genai_config: Literal["rewrite", "none"],
    ) -> PruneFiles:
        """Names the files of a cut of ``model``, which was read from ``source``.

        Raises:
            SurgeryError: The config of onnxruntime-genai can't be rewritten for the result.
        """
        from graph_passes.files.storage import data_files

        genai = GenaiResult.beside(source, target) if genai_config == "rewrite" else None
        data = tuple(data_files(model))
        return cls(source, data, target, weights, report, genai)

    @property
    def all(self) -> list[Path]:
        """Every file but the config of onnxruntime-genai."""
        return [self.source, *self.data, self.target, self.report]

    def refuse_harm(
        self, model: ir.Model, replacements: Replacements | None, *, report_asked: bool
    ) -> None:
        """Keeps what is there from being overwritten, and results from overwriting each other.

        Args:
            model: The graph that is cut.
            replacements: An input too.
            report_asked: Whether the report's place was asked for.

        Raises:
            SurgeryError: Two of the files are one, or something else than this result's report
                stands in the report's place.
            OnnxFileError: Weights that someone needs stand in the result's place, or would be
                shared across folders.
        """
        from graph_passes.files.storage import refuse_collision

        self._refuse_overwriting(replacements)
        _refuse_foreign_report(self.report, self.target.name, asked=report_asked)
        refuse_collision(model, self.target, self.weights)

    def _refuse_overwriting(self, replacements: Replacements | None) -> None:
        sources = [self.source, *self.data, *([replacements.path] if replacements else [])]
        sources += [self.genai.config.path] if self.genai else []
        targets = [self.target, self.report, *([self.genai.target] if self.genai else [])]
        _refuse_overwriting(sources, targets)


def choose_report_path(target: Path, asked: Path | None) -> Path:
    """Where the report goes: where it is asked for, or ``prune.json`` beside the result.

    Raises:
        SurgeryError: A folder is named.
    """
    for file in (target, asked):
        if file is not None and (not file.name or file.is_dir()):
            raise SurgeryError(f"{file} is a folder.", "Name a file in it, such as pruned.onnx.")
    return asked or target.with_name("prune.json")


def stale_reports(target: Path) -> list[Path]:
    """The report of an earlier cut that stood in a place where something else will stand."""
    path = target.with_name("prune.json")
    if not target.is_file():  # then it was put there for what comes
        return []
    try:
        return [path] if PruneReport.read(path).target == target.name else []
    except (ArtifactError, UsageError):
        return []


def _refuse_foreign_report(path: Path, target: str, *, asked: bool) -> None:
    """Keeps the report of ``target`` from taking the place of something else.

    A place that was asked for may hold another model's report.
    """
    if not path.exists():
        return
    described = _described(path)
    if not asked and described not in ("", target) and (path.parent / described).exists():
        raise SurgeryError(f"{path} is the report of {described}.", _ELSEWHERE)


def _described(path: Path) -> str:
    """The model that the report at a path speaks of."""
    try:
        return PruneReport.read(path).target
    except ArtifactError as error:
        raise SurgeryError(
            f"{path} is there already and is no report of a cut.", _ELSEWHERE
        ) from error


def _refuse_overwriting(sources: Sequence[Path], targets: Sequence[Path]) -> None:
    for target in targets:
        if any(_same_file(target, source) for source in sources):
            raise SurgeryError(
                f"{target} is the source, its weights or its config; the source is never changed.",
                "Write the result under another name.",
            )
    for one, other in itertools.combinations(targets, 2):
        if _same_file(one, other):
            raise SurgeryError(
                f"The result and its report need a file each, but both are {one}.",
                "Write the result or the report under another name.",
            )


def _same_file(one: Path, other: Path) -> bool:
    return real(one) == real(other) or (one.exists() and other.exists() and one.samefile(other))
