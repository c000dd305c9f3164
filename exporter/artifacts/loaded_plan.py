"""A plan with all that a cut needs of it, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import PlannedDeletion, PruningPlan
from exporter.artifacts.plans import hold_against_model, read_plan
from exporter.artifacts.replacement_file import (
    ChangedWeight,
    Replacements,
    read_replacements,
)
from exporter.files import sha256_file
from exporter.progress import Progress
from graph_passes.types import Deletion, SublayerRef

if TYPE_CHECKING:
    from graph_passes.replacements import ReplacementTensors


@dataclass(frozen=True)
class LoadedPlan:
    """A plan, and the numbers of its replacements.

    Attributes:
        plan: What is to go.
        replacements: The numbers for the deletions that name a replacement; None without any.
        path: The plan's file; None where it comes from none.
        sha256: The hash of that file.
    """

    plan: PruningPlan
    replacements: Replacements | None = None
    path: Path | None = None
    sha256: str | None = None

    @classmethod
    def read(cls, path: Path) -> LoadedPlan:
        """Reads a plan's file and that of its replacements."""
        plan = read_plan(path)
        return cls(plan, read_replacements(plan, path), path, sha256_file(path))

    @classmethod
    def of(
        cls, deletions: Sequence[PlannedDeletion], replacements: Replacements | None = None
    ) -> LoadedPlan:
        """A plan that stands in no file."""
        return cls(PruningPlan(deletions=list(deletions)), replacements)

    @property
    def deletions(self) -> list[Deletion]:
        """What is to go, as the surgery takes it."""
        return [Deletion(d.layer, d.kind, d.replacement) for d in self.plan.deletions]

    @property
    def tensors(self) -> Mapping[SublayerRef, ReplacementTensors]:
        """The replacements' numbers, as the surgery takes them."""
        return {} if self.replacements is None else self.replacements.tensors

    @property
    def changed_weights(self) -> Mapping[str, ChangedWeight]:
        """New values of weights that the model keeps, by the parameter's name in PyTorch."""
        return {} if self.replacements is None else self.replacements.weights

    @property
    def inputs(self) -> list[Path]:
        """The files that it was read from."""
        numbers = [] if self.replacements is None else [self.replacements.path]
        return [*([] if self.path is None else [self.path]), *numbers]

    @property
    def hashes(self) -> dict[str, str]:
        """Those of the files, by their roles in what is made from them."""
        result = {} if self.sha256 is None else {"plan": self.sha256}
        return (
            result
            if self.replacements is None
            else result | {"replacements": self.replacements.sha256}
        )

    def hold_against(self, model_sha256: str | None, model: str, progress: Progress) -> None:
        """Warns of a plan for another model; see :func:`hold_against_model`."""
        hold_against_model(self.plan, model_sha256, model=model, path=self.path, progress=progress)
