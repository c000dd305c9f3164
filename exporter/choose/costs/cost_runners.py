"""Where costs are measured: what runs the whole graph, and variants of it with sublayers cut."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.choose.costs.graph_sizes import GraphSizes
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import Variant
from exporter.choose.costs.weighing import sizes
from exporter.compare.timing.subjects import RunnerArm, TimedArm
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
from exporter.models.graph_facts import GraphFacts, read_facts
from exporter.models.model_folder import PIXELS, find_model
from exporter.progress import QUIET, Progress
from graph_passes.files.storage import data_files, load_model
from graph_passes.replacements import ReplacementTensors

_SCALE = 0.01
"""Of the random numbers in replacements: small ones, so that all that is computed stays finite."""


class CostRunner(Protocol):
    """A model on an engine.

    Attributes:
        threads: CPU threads that it is given.
    """

    threads: int

    @property
    def backend(self) -> str:
        """The engine."""

    @property
    def provider(self) -> str:
        """On what it runs."""

    @property
    def on_gpu(self) -> bool:
        """Whether that is an NVIDIA GPU."""

    @property
    def sha256(self) -> str:
        """Of the model's files."""

    @property
    def sizes(self) -> GraphSizes:
        """What its sublayers take."""

    def arms(self, variant: Variant) -> AbstractContextManager[Mapping[str, TimedArm]]:
        """The whole model and one with some sublayers cut, loaded while the block runs.

        Raises:
            SurgeryError: They can't be cut.
        """


@dataclass
class OnnxCostRunner:
    """An ONNX file on ONNX Runtime, or on another backend for such files."""

    onnx: Path
    folder: Path
    device: str = "cpu"
    threads: int = 1
    runs_on: str = ONNX

    @property
    def backend(self) -> str:
        """See :class:`CostRunner`."""
        return self._runner(self.onnx).backend

    @property
    def provider(self) -> str:
        """See :class:`CostRunner`."""
        return self._runner(self.onnx).provider

    @property
    def on_gpu(self) -> bool:
        """See :class:`CostRunner`."""
        return self.device == "cuda"

    @property
    def sha256(self) -> str:
        """See :class:`CostRunner`."""
        return self._facts.sha256

    @cached_property
    def sizes(self) -> GraphSizes:
        """See :class:`CostRunner`."""
        return sizes(self.onnx)

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows; 1 where it reads images."""
        if PIXELS in self._facts.inputs:
            return 1
        result = self._facts.vocabulary or find_model(self.onnx).config.get("vocab_size")
        if not isinstance(result, int):
            raise CostError(
                f"{self.onnx} doesn't say how many tokens its vocabulary has.",
                "Put the model's config.json next to it.",
            )
        return result

    @cached_property
    def _facts(self) -> GraphFacts:
        return read_facts(self.onnx)

    @contextmanager
    def arms(self, variant: Variant) -> Iterator[Mapping[str, TimedArm]]:
        """See :class:`CostRunner`."""
        cut = cut_for_a_while(self.onnx, self.folder, variant, self.sizes)
        with cut as graph:
            runners = {"baseline": self._runner(self.onnx), "candidate": self._runner(graph)}
            with subjects(runners, self.vocabulary) as loaded:
                yield loaded

    @contextmanager
    def arms_of(
        self, variants: Mapping[str, Variant], beside: Mapping[str, Path]
    ) -> Iterator[Mapping[str, TimedArm]]:
        """The whole model, several variants and other graphs, all loaded while the block runs."""
        with ExitStack() as stack:
            runners = {"baseline": self._runner(self.onnx)}
            for name, variant in variants.items():
                cut = cut_for_a_while(self.onnx, self.folder, variant, self.sizes)
                runners[name] = self._runner(stack.enter_context(cut))
            runners |= {name: self._runner(graph) for name, graph in beside.items()}
            yield stack.enter_context(subjects(runners, self.vocabulary))

    def _runner(self, onnx: Path) -> Runner:
        return open_runner(self.runs_on, onnx, provider=self.device, threads=self.threads)


@contextmanager
def subjects(runners: Mapping[str, Runner], vocabulary: int) -> Iterator[Mapping[str, TimedArm]]:
    """Loads runners for timing; frees whichever are loaded when the block ends."""
    try:
        for runner in runners.values():
            runner.__enter__()
        yield {name: RunnerArm([runner], vocabulary) for name, runner in runners.items()}
    finally:
        for runner in runners.values():
            runner.__exit__(None, None, None)


@contextmanager
def cut_for_a_while(
    onnx: Path, folder: Path, variant: Variant, sizes: GraphSizes
) -> Iterator[Path]:
    """Cuts a variant into a folder of its own, which is gone after the block.

    Its weights are the source's own where both folders are on one file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".costs.", dir=folder) as name:
        place = Path(name)
        source, weights = _linked(onnx, place)
        target = place / f"{onnx.stem}.variant.onnx"
        prune_file(
            source,
            target,
            LoadedPlan.of(
                [
                    PlannedDeletion.model_validate(
                        {"layer": m.layer, "kind": m.kind, "replacement": variant.replacement}
                    )
                    for m in variant.members
                ],
                _numbers(variant, sizes, place),
            ),
            CutOptions(verify="none", weights=weights, companions=False, genai_config="none"),
        )
        yield target


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


def _numbers(variant: Variant, sizes: GraphSizes, place: Path) -> Replacements | None:
    """Random ones, the same for every sublayer."""
    if variant.replacement == "none":
        return None
    hidden = sizes.hidden
    assert hidden is not None  # else nothing is replaced
    one = random_replacement(hidden, variant.replacement)
    tensors = {member.name: one for member in variant.members}
    return Replacements(place / "random.safetensors", sha256_bytes(b"random"), tensors)


def random_replacement(hidden: int, replacement: str) -> ReplacementTensors:
    """The numbers of a replacement that means nothing."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return _SCALE * rng.standard_normal(shape, dtype=np.float32)

    if replacement == "bias":
        return ReplacementTensors(draw(hidden))
    return ReplacementTensors(draw(hidden), draw(hidden, hidden))


@dataclass
class EngineCostRunner:
    """An ONNX file as a TensorRT engine, built anew for each variant."""

    onnx: Path
    folder: Path
    at: RequestShape
    backend: Backend = "tensorrt-rtx"
    settings: BuildSettings = field(default_factory=BuildSettings)
    threads: int = 1
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
        """The whole model and one with some sublayers cut, loaded while the block runs."""
        with cut_for_a_while(self.onnx, self.folder, variant, self.sizes) as graph:
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
