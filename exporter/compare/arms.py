"""The arms of a comparison: what runs, and the files that tell about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifacts import Arm
from exporter.compare.options import CompareOptions
from exporter.errors import ComparisonError
from exporter.progress import Progress

if TYPE_CHECKING:
    from exporter.backends.base import Runner
    from exporter.measure.graph_facts import GraphFacts
    from exporter.measure.model_folder import ModelFolder


@dataclass(frozen=True)
class ComparedArm:
    """One side: its runner, the folder that it came from, and what its graph tells."""

    runner: Runner
    folder: ModelFolder
    facts: GraphFacts

    def record(self) -> Arm:
        """What the report says of it."""
        runner, facts = self.runner, self.facts
        return Arm(
            backend=runner.backend,
            provider=runner.provider,
            precision=facts.precision,
            path=str(self.folder.onnx),
            sha256=facts.sha256,
            file_bytes=facts.file_bytes,
            parameters=facts.parameters,
            nodes=facts.nodes,
            kv_cache_bytes_per_token=facts.kv_cache_bytes_per_token,
            cpu_nodes=dict(runner.cpu_nodes),
        )


@dataclass(frozen=True)
class Pair:
    """Both arms, and how they are to be compared."""

    options: CompareOptions
    baseline: ComparedArm
    candidate: ComparedArm
    progress: Progress

    @property
    def runners(self) -> tuple[Runner, Runner]:
        """The baseline's and the candidate's."""
        return self.baseline.runner, self.candidate.runner

    def vocabulary(self) -> int:
        """How many tokens the models know.

        Raises:
            ComparisonError: When neither graph nor config tells.
        """
        folder = self.baseline.folder
        told = self.baseline.facts.vocabulary or folder.config.get("vocab_size")
        if not isinstance(told, int):
            raise ComparisonError(
                f"{folder.onnx} doesn't tell how many tokens it knows.",
                "Put the model's config.json beside it.",
            )
        return told

    def refuse_other_interface(self) -> None:
        """Refuses arms that don't take and give the same.

        Raises:
            ComparisonError: They are no forms of one model.
        """
        baseline, candidate = self.runners
        known = {spec.name for spec in baseline.inputs}
        foreign = [spec.name for spec in candidate.inputs if spec.name not in known]
        if foreign:
            raise ComparisonError(
                f"The candidate has an input {foreign[0]!r} that the baseline doesn't have.",
                "Compare a model with its own pruned form.",
            )
        results = [_results(runner) for runner in (baseline, candidate)]
        if results[0] != results[1]:
            raise ComparisonError(
                f"The arms have other outputs: {sorted(results[0])} and {sorted(results[1])}.",
                "Compare a model with its own pruned form.",
            )


def open_arm(path: Path, options: CompareOptions, *, threads: int) -> ComparedArm:
    """Finds an arm's files; its runner is not entered yet.

    Raises:
        OnnxFileError: The file is no complete ONNX model.
        ComparisonError: ``config.json`` is no JSON object.
        BackendError: The provider is not known.
    """
    from exporter.backends.onnxruntime import OnnxRuntimeRunner
    from exporter.measure.graph_facts import read_facts
    from exporter.measure.model_folder import find_model

    folder = find_model(path)
    runner = OnnxRuntimeRunner(folder.onnx, provider=options.provider, threads=threads)
    return ComparedArm(runner, folder, read_facts(folder.onnx))


def _results(runner: Runner) -> set[str]:
    return {spec.name for spec in runner.outputs if not spec.name.startswith("present")}
