"""What is held against each other: an ONNX file on ONNX Runtime, or an engine on its library.

Either can also be run with inner tensors of the graph as outputs: the ONNX file as a marked copy,
the engine as one that is built from such a copy in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from exporter.engines.build.build import build_engines
from exporter.engines.build.child import run_job
from exporter.engines.build.engine_set import EngineSet, Slot
from exporter.engines.build.polygraphy_run import polygraphy
from exporter.engines.explain.polygraphy_runs import Results, run_onnx, save_inputs
from exporter.engines.runners.base import Array
from exporter.progress import Progress
from graph_passes.files.storage import load_model, save_model

Feed = Mapping[str, Array]


class Arm(Protocol):
    """One side."""

    def has(self, tensor: str) -> bool:
        """Whether it could give an inner tensor."""

    def run(self, feed: Feed, marks: Sequence[str] = ()) -> Results:
        """Polygraphy's results, with those inner tensors among the outputs."""


@dataclass(frozen=True)
class OnnxArm:
    """An ONNX file.

    Attributes:
        onnx: The file.
        work: A folder for marked copies.
        threads: CPU threads for one operator.
    """

    onnx: Path
    work: Path
    threads: int

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """Its inner tensors by name."""
        nodes = load_model(self.onnx).graph
        return {value.name: value for node in nodes for value in node.outputs if value.name}

    def has(self, tensor: str) -> bool:
        """Whether a node of the graph gives it."""
        return tensor in self.values

    def run(self, feed: Feed, marks: Sequence[str] = ()) -> Results:
        """Runs it."""
        return run_onnx(self.marked(marks) if marks else self.onnx, feed, self.threads)

    def marked(self, marks: Sequence[str]) -> Path:
        """A copy whose outputs are those of the file and these."""
        model = load_model(self.onnx)
        known = {value.name for value in model.graph.outputs}
        inner = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs.extend(inner[name] for name in marks if name not in known)
        path = _new(self.work, "marked.onnx")
        save_model(model, path)
        return path


@dataclass(frozen=True)
class EngineArm:
    """A profile of an engine.

    Attributes:
        engines: The engine's set.
        slot: The profile.
        source: The ONNX file that it was built from.
        work: A folder for marked engines.
        progress: Hears what is built.
    """

    engines: EngineSet
    slot: Slot
    source: OnnxArm
    work: Path
    progress: Progress

    def has(self, tensor: str) -> bool:
        """Whether the graph has it."""
        return self.source.has(tensor)

    def run(self, feed: Feed, marks: Sequence[str] = ()) -> Results:
        """Runs it in a process of its own, which may crash.

        Raises:
            BackendError: There is no driver or no GPU.
            EngineError: It can't be built, loaded or run.
        """
        engine, number = self.engines.paths[self.slot.engine], self.slot.number
        if marks:
            engine, number = self._marked(marks), 0
        inputs, results = (_new(self.work, f"{name}.json") for name in ("inputs", "results"))
        request = {
            "job": "polygraphy", "engine": str(engine.resolve()), "profile": number,
            "inputs": str(inputs), "results": str(results),
        }  # fmt: skip
        with polygraphy():
            from polygraphy.comparator import RunResults

            save_inputs(feed, inputs)
            run_job(self.engines.library, request, self.progress, "run with Polygraphy")
            return RunResults.load(str(results))

    def _marked(self, marks: Sequence[str]) -> Path:
        record = self.engines.records[self.slot.engine]
        [(path, _)] = build_engines(
            self.source.marked(marks),
            _new(self.work, "marked.engine"),
            profiles=[self.slot.profile],
            backend=record.backend,
            settings=replace(record.settings, strip_weights=False),
            progress=self.progress,
        )
        return path


def _new(folder: Path, name: str) -> Path:
    """A file of that name that isn't there yet, in a folder of its own."""
    place = next(each for n in count() if not (each := folder / str(n)).exists())
    place.mkdir()
    return place / name
