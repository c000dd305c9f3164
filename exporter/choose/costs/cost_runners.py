"""Where costs are measured: what runs the whole graph, and variants of it with sublayers cut."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.choose.costs.graph_sizes import GraphSizes
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import Variant
from exporter.choose.costs.weighing import sizes
from exporter.compare.arms import ComparedArm, Comparison
from exporter.compare.kinds import open_file_arm
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
from exporter.files import sha256_bytes
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import data_files, load_model
from graph_passes.replacements import ReplacementTensors

_SCALE = 0.01
"""Of the random numbers in replacements: small ones, so that all that is computed stays finite."""


@dataclass
class CostRunner:
    """A model on an engine, and what runs it with sublayers cut."""

    sizes: GraphSizes
    sha256: str  # of the model's files
    backend: str
    provider: str
    on_gpu: bool
    opened: Callable[[], ComparedArm]  # the whole model
    cut: Callable[[Variant], AbstractContextManager[Runner]]
    threads: int = 1  # CPU threads that all are given

    @cached_property
    def whole(self) -> ComparedArm:
        """The model as an arm, made when it is first asked for."""
        return self.opened()

    @contextmanager
    def arms(self, variants: Mapping[str, Variant]) -> Iterator[Mapping[str, TimedArm]]:
        """The whole model and variants, all loaded while the block runs."""
        with ExitStack() as stack:
            runners = {name: stack.enter_context(self.cut(one)) for name, one in variants.items()}
            yield stack.enter_context(self.beside(runners))

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
    """An ONNX file as a TensorRT engine, built anew for each variant, and once for the whole."""
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
    weighed = sizes(onnx)

    @contextmanager
    def cut(variant: Variant) -> Iterator[Runner]:
        with cut_for_a_while(onnx, folder, partial(plan_of, variant, weighed)) as graph:
            yield opened(graph)

    return CostRunner(weighed, arm.facts.sha256, *engine, whole, cut)


@contextmanager
def cut_for_a_while(
    onnx: Path, folder: Path, plan: Callable[[Path], LoadedPlan], *, share: bool = True
) -> Iterator[Path]:
    """Cuts a graph into a folder of its own, which is gone after the block.

    Shared weights are the source's own where both folders are on one file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".costs.", dir=folder) as name:
        place = Path(name)
        source, weights = _linked(onnx, place) if share else (onnx, "compact")
        target = place / f"{onnx.stem}.variant.onnx"
        options = CutOptions(verify="none", weights=weights, companions=False, genai_config="none")
        prune_file(source, target, plan(place), options)
        yield target


def plan_of(variant: Variant, sizes: GraphSizes, place: Path) -> LoadedPlan:
    """What of a variant goes, with random numbers in its place, the same for every sublayer."""
    deletions = [
        PlannedDeletion(layer=m.layer, kind=m.kind, replacement=variant.replacement)
        for m in variant.members
    ]
    if variant.replacement == "none":
        return LoadedPlan.of(deletions)
    hidden = sizes.hidden
    assert hidden is not None  # else nothing is replaced
    one = random_replacement(hidden, variant.replacement)
    tensors = {member.name: one for member in variant.members}
    numbers = Replacements(place / "random.safetensors", sha256_bytes(b"random"), tensors)
    return LoadedPlan.of(deletions, numbers)


def _linked(onnx: Path, place: Path) -> tuple[Path, Literal["share", "compact"]]:
    """The source beside the variant, by other names of the same files; or itself, elsewhere."""
    data, root = data_files(load_model(onnx)), onnx.parent
    if not data or not all(path.is_relative_to(root) for path in data):
        return onnx, "compact"
    names = {path: place / path.relative_to(root) for path in (onnx, *data)}
    try:
        for path, name in names.items():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.hardlink_to(path.resolve())
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        for name in names.values():
            name.unlink(missing_ok=True)
        return onnx, "compact"
    return names[onnx], "share"


def random_replacement(hidden: int, replacement: str) -> ReplacementTensors:
    """The numbers of a replacement that means nothing."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return _SCALE * rng.standard_normal(shape, dtype=np.float32)

    if replacement == "bias":
        return ReplacementTensors(draw(hidden))
    return ReplacementTensors(draw(hidden), draw(hidden, hidden))


def ranges_for(at: RequestShape) -> Ranges:
    """What an engine must serve for a request."""
    last = max(at.prompt, at.longest - 1)
    return Ranges(
        batch=Span(at.batch, at.batch, at.batch),
        prompt=Span(1, at.prompt, at.prompt),
        context=Span(1, (at.prompt + last) // 2, last),
    )
