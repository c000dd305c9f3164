"""An ONNX file as a TensorRT engine, built anew for each variant.

Written without a GPU at hand: what it is made of, building and running engines, is tested apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from exporter.choose.costs.cost_runners import OnnxCostRunner, cut_for_a_while, subjects
from exporter.choose.costs.graph_sizes import GraphSizes
from exporter.choose.costs.grouping import Variant
from exporter.choose.costs.request_shape import RequestShape
from exporter.compare.timing.subjects import TimedArm
from exporter.engines.build.build import build_engines
from exporter.engines.build.libraries import Backend, ask_driver
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.build.settings import BuildSettings
from exporter.engines.runners.base import Runner
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import CostError
from exporter.progress import QUIET, Progress


@dataclass
class EngineCostRunner:
    """See :class:`exporter.choose.costs.cost_runners.CostRunner`.

    Attributes:
        onnx: The graph.
        folder: Where engines and variants are written; the whole graph's engine stays there.
        at: The request, whose shapes the engines are built for.
        backend: The library that builds and runs them.
        settings: How they are built.
        threads: It has no say here.
        rank: Of linear maps; None for full ones.
        progress: Hears what the builder says.

    Raises:
        CostError: There is no GPU to run engines.
    """

    onnx: Path
    folder: Path
    at: RequestShape
    backend: Backend = "tensorrt-rtx"
    settings: BuildSettings = field(default_factory=BuildSettings)
    threads: int = 1
    rank: int | None = None
    progress: Progress = QUIET

    def __post_init__(self) -> None:
        problem = ask_driver().problem
        if problem:
            raise CostError(
                f"Engines can't be timed here: {problem}.",
                "Measure on ONNX Runtime, or on a machine with an NVIDIA GPU.",
            )

    @property
    def provider(self) -> str:
        """The library again: the card is a part of the machine."""
        return self.backend

    @property
    def on_gpu(self) -> bool:
        """It is an NVIDIA GPU."""
        return True

    @property
    def sha256(self) -> str:
        """Of the graph's files."""
        return self._graph.sha256

    @property
    def sizes(self) -> GraphSizes:
        """What the graph's sublayers take."""
        return self._graph.sizes

    @cached_property
    def _graph(self) -> OnnxCostRunner:
        return OnnxCostRunner(self.onnx, self.folder)

    @cached_property
    def _baseline(self) -> Runner:
        return self._built(self.onnx, self.folder / "whole")

    @contextmanager
    def arms(self, variant: Variant) -> Iterator[Mapping[str, TimedArm]]:
        """The whole model and one with some sublayers cut, loaded while the block runs.

        Raises:
            SurgeryError: They can't be cut.
            EngineError: No engine can be built.
        """
        with cut_for_a_while(self.onnx, self.folder, variant, self.sizes, self.rank) as graph:
            cut = self._built(graph, graph.parent / "engines")
            runners = {"baseline": self._baseline, "candidate": cut}
            with subjects(runners, self._graph.vocabulary) as loaded:
                yield loaded

    def _built(self, onnx: Path, target: Path) -> Runner:
        target.mkdir(parents=True, exist_ok=True)
        built = build_engines(
            onnx,
            target,
            ranges=fitting(graph_inputs(onnx), ranges_for(self.at)),
            backend=self.backend,
            settings=self.settings,
            progress=self.progress,
        )
        return open_engine([path for path, _ in built])


def ranges_for(at: RequestShape) -> Ranges:
    """What an engine must serve for a request."""
    last = max(at.prompt, at.longest - 1)
    return Ranges(
        batch=Span(at.batch, at.batch, at.batch),
        prompt=Span(1, at.prompt, at.prompt),
        context=Span(1, (at.prompt + last) // 2, last),
    )
