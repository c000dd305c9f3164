"""Where costs are measured: what runs the whole model, and others beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts.loaded_plan import LoadedPlan
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.weighing import module_sizes, sizes
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.kinds import open_file_arm, torch_arm
from exporter.compare.options import CompareOptions
from exporter.compare.timing.subjects import TimedArm
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.build import build_engines
from exporter.engines.build.libraries import Backend, ask_driver
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, open_runner
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import CostError
from exporter.models.model_folder import image_patches, longest_sequence
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    from exporter.models.loading.model_source import LoadedModel

_OPERATOR_BYTES = 80_000
"""A rule of thumb for ONNX Runtime on a CPU; other engines fuse operators, or start them beside."""

_PlanAt = Callable[[Path], LoadedPlan]
"""Makes a plan, whose numbers may lie in the folder."""


@dataclass
class CostRunner:
    """A model on an engine, beside which cut ones can be loaded."""

    sizes: GraphSizes
    sha256: str  # of the model's files
    backend: str
    provider: str
    on_gpu: bool
    opened: Callable[[], ComparedArm]  # the whole model
    cut: Callable[[_PlanAt], AbstractContextManager[Runner]] | None = None  # None: none is made
    threads: int = 1  # CPU threads that all are given

    @cached_property
    def whole(self) -> ComparedArm:
        """The model as an arm, made when it is first asked for."""
        return self.opened()

    @contextmanager
    def beside(self, runners: Mapping[str, Runner]) -> Iterator[Mapping[str, TimedArm]]:
        """The whole model and others, all loaded while the block runs."""
        arms = {"baseline": self.whole.runner, **runners}
        for runner in arms.values():
            runner.threads = self.threads
        comparison = Comparison({n: replace(self.whole, builds=(run,)) for n, run in arms.items()})
        with comparison.running():
            yield comparison.timed()


def graph_runner(
    onnx: Path, folder: Path, provider: str = "cpu", runs_on: str = ONNX
) -> CostRunner:
    """An ONNX file on ONNX Runtime, or on another backend for such files."""
    arm = _file(onnx, provider, runs_on)
    opened = partial(open_runner, runs_on, provider=provider, threads=1)
    engine = arm.runner.backend, arm.runner.provider, arm.runner.capabilities.device == "gpu"
    return _on_graphs(onnx, folder, arm, engine, lambda: arm, opened)


def engine_runner(
    onnx: Path,
    folder: Path,
    at: RequestShape,
    library: Backend = "tensorrt-rtx",
    progress: Progress = QUIET,
) -> CostRunner:
    """An ONNX file as a TensorRT engine."""
    problem = ask_driver().problem
    if problem:
        raise CostError(
            f"Engines can't be timed here: {problem}.",
            "Measure on ONNX Runtime, or on a machine with an NVIDIA GPU.",
        )
    arm = _file(onnx, "cpu", ONNX)

    def built(graph: Path, target: Path | None = None) -> Runner:
        target = target or graph.parent / "engines"
        target.mkdir(parents=True, exist_ok=True)
        ranges = fitting(graph_inputs(graph), ranges_for(at))
        engines = build_engines(graph, target, ranges=ranges, backend=library, progress=progress)
        return open_engine([path for path, _ in engines])

    def whole() -> ComparedArm:
        return replace(arm, builds=(built(onnx, folder / "whole"),))

    return _on_graphs(onnx, folder, arm, (library, library, True), whole, built)


def torch_runner(loaded: LoadedModel, device: str = "cpu", *, compiled: bool = False) -> CostRunner:
    """A loaded model on PyTorch."""
    from exporter.engines.runners.pytorch import TorchRunner
    from exporter.models.onnx_interface import interface_of

    model: Any = loaded.model
    interface, config = interface_of(model), model.config.get_text_config().to_dict()
    weighed = module_sizes(loaded)
    own = dict(weighed.sublayers)
    for slot in interface.cache:
        name = SublayerRef(slot.layer, "attention")
        per_token = (slot.heads * size * interface.dtype.itemsize for _, size in slot.parts)
        own[name] = replace(own[name], caches=tuple(map(CacheSize, per_token)))
    longest = longest_sequence(config) if interface.image is None else image_patches(config)
    running = TorchRunner(model, interface=interface, compiled=compiled, provider=device, threads=1)
    whole = torch_arm(loaded, loaded.path, running, "torch:")
    on_gpu = running.capabilities.device == "gpu"
    engine = running.backend, running.provider, on_gpu
    weighed = replace(weighed, sublayers=own, longest=longest)
    return CostRunner(weighed, whole.facts.sha256, *engine, lambda: whole)


def _file(onnx: Path, provider: str, runs_on: str) -> ComparedArm:
    options = CompareOptions(provider=provider)  # type: ignore[arg-type]
    return open_file_arm(onnx, options, threads=1, backend=runs_on)


def _on_graphs(
    onnx: Path,
    folder: Path,
    arm: ComparedArm,
    engine: tuple[str, str, bool],
    whole: Callable[[], ComparedArm],
    opened: Callable[[Path], Runner],
) -> CostRunner:
    @contextmanager
    def cut(plan: _PlanAt) -> Iterator[Runner]:
        with cut_for_a_while(onnx, folder, plan) as graph:
            yield opened(graph)

    started = _OPERATOR_BYTES if engine[:2] == ("onnxruntime", "CPUExecutionProvider") else 0
    weighed = replace(sizes(onnx), operator_bytes=started)
    return CostRunner(weighed, arm.facts.sha256, *engine, whole, cut)


@contextmanager
def cut_for_a_while(onnx: Path, folder: Path, plan: _PlanAt) -> Iterator[Path]:
    """Cuts a graph into a folder of its own, which is gone after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".costs.", dir=folder) as name:
        target = Path(name) / f"{onnx.stem}.variant.onnx"
        options = CutOptions(
            verify="none", weights="compact", companions=False, genai_config="none"
        )
        prune_file(onnx, target, plan(Path(name)), options)
        yield target


def ranges_for(at: RequestShape) -> Ranges:
    """What an engine must serve for a request."""
    last = max(at.prompt, at.longest - 1)
    return Ranges(
        batch=Span(at.batch, at.batch, at.batch),
        prompt=Span(1, at.prompt, at.prompt),
        context=Span(1, (at.prompt + last) // 2, last),
    )
