"""Where costs are measured: what runs the whole graph, and variants of it with sublayers cut."""

from __future__ import annotations

import errno
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
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
from exporter.engines.build.settings import BuildSettings
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, open_runner
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import CostError
from exporter.files import sha256_bytes
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import data_files, load_model
from graph_passes.replacements import ReplacementTensors

NOTHING: Mapping[str, Path] = MappingProxyType({})
_SCALE = 0.01
"""Of the random numbers in replacements: small ones, so that all that is computed stays finite."""


class CostRunner(ABC):
    """A model on an engine, and variants of it with sublayers cut."""

    threads: int = 1  # CPU threads that all are given

    @property
    @abstractmethod
    def sizes(self) -> GraphSizes:
        """What its sublayers take."""

    @property
    @abstractmethod
    def whole(self) -> ComparedArm:
        """The model as an arm."""

    @abstractmethod
    def cut(self, variant: Variant) -> AbstractContextManager[Runner]:
        """A runner of a variant, which may be entered while the block runs.

        Raises:
            SurgeryError: The sublayers can't be cut.
        """

    def beside(self, graph: Path) -> Runner:
        """A runner of another graph that is timed beside the model."""
        raise NotImplementedError

    @property
    def backend(self) -> str:
        """The engine."""
        return self.whole.runner.backend

    @property
    def provider(self) -> str:
        """On what it runs."""
        return self.whole.runner.provider

    @property
    def on_gpu(self) -> bool:
        """Whether that is an NVIDIA GPU."""
        return self.whole.runner.capabilities.device == "gpu"

    @property
    def sha256(self) -> str:
        """Of the model's files."""
        return self.whole.facts.sha256

    @contextmanager
    def arms(
        self, variants: Mapping[str, Variant], others: Mapping[str, Path] = NOTHING
    ) -> Iterator[Mapping[str, TimedArm]]:
        """The whole model, variants and other graphs, all loaded while the block runs."""
        with ExitStack() as stack:
            self.whole.runner.threads = self.threads
            runners = {"baseline": self.whole.runner}
            for name, variant in variants.items():
                runners[name] = stack.enter_context(self.cut(variant))
            runners |= {name: self.beside(graph) for name, graph in others.items()}
            comparison = Comparison(
                {name: replace(self.whole, builds=(run,)) for name, run in runners.items()}
            )
            stack.enter_context(comparison.running())
            yield comparison.timed()


@dataclass
class OnnxCostRunner(CostRunner):
    """An ONNX file on ONNX Runtime, or on another backend for such files."""

    onnx: Path
    folder: Path
    device: str = "cpu"
    runs_on: str = ONNX

    @cached_property
    def sizes(self) -> GraphSizes:
        """What its sublayers take."""
        return sizes(self.onnx)

    @property
    def whole(self) -> ComparedArm:
        """The file."""
        return self._file

    @cached_property
    def _file(self) -> ComparedArm:
        options = CompareOptions(provider=self.device)  # type: ignore[arg-type]
        return open_file_arm(self.onnx, options, threads=self.threads, backend=self.runs_on)

    @contextmanager
    def cut(self, variant: Variant) -> Iterator[Runner]:
        """A file that is gone after the block."""
        plan = partial(plan_of, variant, self.sizes)
        with cut_for_a_while(self.onnx, self.folder, plan) as graph:
            yield self.beside(graph)

    def beside(self, graph: Path) -> Runner:
        """Another file, on the same backend."""
        return open_runner(self.runs_on, graph, provider=self.device, threads=self.threads)


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


@dataclass
class EngineCostRunner(OnnxCostRunner):
    """An ONNX file as a TensorRT engine, built anew for each variant."""

    at: RequestShape = field(default_factory=RequestShape)
    library: Backend = "tensorrt-rtx"
    settings: BuildSettings = field(default_factory=BuildSettings)
    progress: Progress = QUIET

    def __post_init__(self) -> None:
        problem = ask_driver().problem
        if problem:
            raise CostError(
                f"Engines can't be timed here: {problem}.",
                "Measure on ONNX Runtime, or on a machine with an NVIDIA GPU.",
            )

    @property
    def backend(self) -> str:
        """The library."""
        return self.library

    @property
    def provider(self) -> str:
        """The library again: the card is a part of the machine."""
        return self.library

    @property
    def on_gpu(self) -> bool:
        """It is an NVIDIA GPU."""
        return True

    @property
    def sha256(self) -> str:
        """Of the graph's files."""
        return self._file.facts.sha256

    @property
    def whole(self) -> ComparedArm:
        """The engine of the whole graph, which is built when it is first asked for."""
        return replace(self._file, builds=(self._engine,))

    @cached_property
    def _engine(self) -> Runner:
        return self._built(self.onnx, self.folder / "whole")

    @contextmanager
    def cut(self, variant: Variant) -> Iterator[Runner]:
        """An engine that is gone after the block."""
        plan = partial(plan_of, variant, self.sizes)
        with cut_for_a_while(self.onnx, self.folder, plan) as graph:
            yield self._built(graph, graph.parent / "engines")

    def _built(self, onnx: Path, target: Path) -> Runner:
        target.mkdir(parents=True, exist_ok=True)
        built = build_engines(
            onnx,
            target,
            ranges=fitting(graph_inputs(onnx), ranges_for(self.at)),
            backend=self.library,
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
