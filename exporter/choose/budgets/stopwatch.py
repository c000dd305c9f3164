"""Measures what requests take: of a graph's sublayers, and of finished candidates."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from exporter.artifacts import Speedup
from exporter.choose.budgets.walk import Walk
from exporter.choose.costs import At, CostTable, Effort
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement

_WEIGHTS = (".onnx", ".data", ".bin", ".safetensors", ".gguf")


class Stopwatch(Protocol):
    """Has a graph and a request in its hands."""

    def costs(self, replacements: Sequence[Replacement], rank: int | None) -> CostTable:
        """What each sublayer's removal saves, for every replacement."""

    def speedup(self, walk: Walk) -> Speedup:
        """How much faster the finished candidate answers."""


@dataclass
class OnnxStopwatch:
    """Times a graph on ONNX Runtime.

    Attributes:
        onnx: The whole graph.
        at: The request.
        kept: The file of the costs; what it holds of the same graph, machine and request is not
            measured again.
        folder: Takes candidates for a while; on the graph's file system they share its weights.
        provider: ``cpu`` or ``cuda``.
        threads: CPU threads; None: what makes the graph's step fastest, found with the costs.
        may_replace: Whether costs of something else that the file holds are replaced; else they
            are refused.
        variants: How long each variant is timed.
        candidates: How long each candidate is timed.
        progress: Told what goes on.
    """

    onnx: Path
    at: At
    kept: Path
    folder: Path
    provider: str = "cpu"
    threads: int | None = None
    may_replace: bool = True
    variants: Effort = field(default_factory=Effort)
    candidates: Effort = field(default_factory=lambda: Effort(seconds=120.0))
    progress: Progress = QUIET

    def costs(self, replacements: Sequence[Replacement], rank: int | None) -> CostTable:
        """See :class:`Stopwatch`.

        Raises:
            CostError: The graph can't serve such a request, or the file holds other costs.
            BackendError: A run fails.
        """
        from exporter.choose.costs import CostSettings, measure_costs

        self.kept.parent.mkdir(parents=True, exist_ok=True)
        settings = CostSettings(
            self.at,
            self.threads,
            tuple(replacements),
            effort=self.variants,
            kept=self.kept,
            may_replace=self.may_replace,
        )
        table = measure_costs(
            self.onnx,
            settings,
            provider=self.provider,
            rank=rank,
            folder=self.folder,
            progress=self.progress,
        )
        self.threads = table.environment.threads
        return table

    def speedup(self, walk: Walk) -> Speedup:
        """See :class:`Stopwatch`.

        Raises:
            SurgeryError: The candidate can't be cut.
            BackendError: A run fails.
        """
        from exporter.choose.costs import measure_speedup

        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".candidate.", dir=self.folder) as name:
            candidate = self._cut(walk, Path(name))
            return measure_speedup(
                self.onnx,
                candidate,
                self.at,
                provider=self.provider,
                threads=self.threads,
                effort=self.candidates,
                progress=self.progress,
            ).speedup

    def _cut(self, walk: Walk, folder: Path) -> Path:
        """The walk's candidate, as it would be shipped."""
        from exporter.artifacts import PruningPlan
        from exporter.artifacts.plans.loaded import LoadedPlan
        from exporter.cut.options import CutOptions
        from exporter.cut.surgery import prune_file
        from exporter.heal.plan_file import write_healed_plan

        for file in self.onnx.parent.iterdir():
            if file.is_file() and file.suffix not in _WEIGHTS:
                shutil.copyfile(file, folder / file.name)
        path = folder / "candidate-plan.json"
        write_healed_plan(path, PruningPlan(deletions=walk.deletions), walk.cut)
        target = folder / "model.onnx"
        prune_file(
            self.onnx,
            target,
            LoadedPlan.read(path),
            CutOptions(verify="none", genai_config="none"),
        )
        return target
