"""An ONNX file as a TensorRT engine, built anew for each variant."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.loaded_plan import LoadedPlan, Replacements
from exporter.choose.costs.cost_runners import (
    CostRunner,
    OnnxCostRunner,
    cut_for_a_while,
    random_replacement,
    subjects,
)
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize
from exporter.choose.costs.request_shape import RequestShape
from exporter.choose.costs.table import Variant
from exporter.compare.kinds import ArmName
from exporter.compare.timing.subjects import TimedArm
from exporter.cut.gguf_layers import place_in_layer, sublayers_of
from exporter.cut.gguf_surgery import cut_gguf
from exporter.engines.build.build import build_engines
from exporter.engines.build.libraries import Backend, ask_driver
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.build.settings import BuildSettings
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, RUNNERS, open_runner
from exporter.engines.runners.tensorrt import open_engine
from exporter.errors import CostError, UsageError
from exporter.files import sha256_bytes
from exporter.models.gguf_header import Tensor
from exporter.models.gguf_model_files import CACHE_BYTES, HIDDEN, gguf_facts, read_model, sizes_of
from exporter.models.loading.model_source import load_model
from exporter.models.model_folder import find_onnx
from exporter.optional import require
from exporter.progress import QUIET, Progress
from graph_passes.replacements import ReplacementTensors
from graph_passes.types import SublayerRef


@dataclass
class EngineCostRunner:
    """See :class:`exporter.choose.costs.cost_runners.CostRunner`."""

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


_BACKEND = "llama.cpp"
_LETTERS = 12
_FIRST = SublayerRef(0, "attention")
"""llama.cpp takes the width of all heads from it, so it can't go."""


@dataclass
class GgufCostRunner:
    """A GGUF file; see :class:`exporter.choose.costs.cost_runners.CostRunner`."""

    model: Path
    folder: Path
    device: str = "cpu"
    threads: int = 1
    backend: ClassVar[str] = _BACKEND
    on_gpu: ClassVar[bool] = False

    @property
    def provider(self) -> str:
        """On what it runs."""
        return open_runner(_BACKEND, self.model, provider=self.device, threads=1).provider

    @cached_property
    def sha256(self) -> str:
        """Of the model's files."""
        return gguf_facts(self.model).sha256

    @cached_property
    def sizes(self) -> GraphSizes:
        """What its sublayers hold, their norms included."""
        model = read_model(self.model)
        layers, hidden = sizes_of(model), model.whole(HIDDEN)
        held = sublayers_of(model)
        held.pop(_FIRST, None)
        if not held:
            raise CostError(f"{self.model} holds no sublayer that can be cut.", code="no-sublayers")
        head = hidden // max(layers[0].heads, 1)
        return GraphSizes(
            {
                ref: _sized(ref, tensors, 2 * head * layers[ref.layer].kv_heads)
                for ref, tensors in held.items()
            },
            sum(math.prod(tensor.shape) for tensor in model.tensors),
            sum(tensor.nbytes for tensor in model.tensors),
            (CacheSize(CACHE_BYTES * 2.0 * head * layers[0].kv_heads),),
            hidden=hidden,
            longest=RUNNERS[_BACKEND].folder(self.model).longest_sequence,
            name=str(self.model),
        )

    @contextmanager
    def arms(self, variant: Variant) -> Iterator[Mapping[str, TimedArm]]:
        """The whole file and one with some sublayers cut, loaded while the block runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = read_model(self.model).path
        with tempfile.TemporaryDirectory(prefix=".costs.", dir=self.folder) as name:
            cut = Path(name) / "variant.gguf"
            cut_gguf(whole, cut, self._plan(variant, Path(name)))
            runners = {
                arm: open_runner(_BACKEND, file, provider=self.device, threads=self.threads)
                for arm, file in {"baseline": whole, "candidate": cut}.items()
            }
            with subjects(runners, self._vocabulary) as loaded:
                yield loaded

    @cached_property
    def _vocabulary(self) -> int:
        vocabulary = gguf_facts(self.model).vocabulary
        if vocabulary is None:
            raise CostError(f"{self.model} has no table of tokens.", code="no-vocabulary")
        return vocabulary

    def _plan(self, variant: Variant, place: Path) -> LoadedPlan:
        deletions = [
            PlannedDeletion.model_validate(
                {"layer": m.layer, "kind": m.kind, "replacement": variant.replacement}
            )
            for m in variant.members
        ]
        if variant.replacement != "linear":
            return LoadedPlan.of(deletions)
        hidden = self.sizes.hidden
        assert hidden is not None
        drawn = random_replacement(hidden, "linear")
        one = ReplacementTensors(np.zeros(hidden, np.float32), drawn.weight)
        tensors = {member.name: one for member in variant.members}
        numbers = Replacements(place / "random.safetensors", sha256_bytes(b"random"), tensors)
        return LoadedPlan.of(deletions, numbers)


def _sized(ref: SublayerRef, tensors: Sequence[Tensor], cached: int) -> SublayerSize:
    norms = [tensor for tensor in tensors if tensor.name.endswith("_norm.weight")]
    count, norm_count = (sum(math.prod(t.shape) for t in item) for item in (tensors, norms))
    held, norms_held = (sum(t.nbytes for t in item) for item in (tensors, norms))
    shapes = sorted((place_in_layer(t.name), t.shape, t.kind) for t in tensors)
    alike = [(place[1], *rest) for place, *rest in shapes if place is not None]
    attention = ref.kind == "attention"
    return SublayerSize(
        count,
        count - norm_count,
        held,
        held - norms_held,
        takes_linear=attention,
        caches=(CacheSize(float(CACHE_BYTES * cached)),) if attention else (),
        signature=sha256_bytes(repr((ref.kind, alike)).encode())[:_LETTERS],
    )


def open_cost_runner(
    model: Path | str,
    folder: Path,
    at: RequestShape,
    *,
    provider: str = "cpu",
    engine: Backend | None = None,
    progress: Progress = QUIET,
) -> CostRunner:
    """Finds what runs a model."""
    name = ArmName.of(model)
    if name.is_torch and engine is None:
        return _torch(name, provider)
    runs_on = RUNNERS.get(name.kind)
    if runs_on is None or (engine is not None and name.kind != ONNX):
        raise CostError(
            f"No variants of {name} can be made.",
            "Name the ONNX file, and for engines of it the library: --engine.",
        )
    if runs_on.gguf:
        return GgufCostRunner(name.path, folder, provider)
    onnx = find_onnx(name.path)
    if engine is None:
        return OnnxCostRunner(onnx, folder, provider, runs_on=name.kind)

    return EngineCostRunner(onnx, folder, at, engine, progress=progress)


def _torch(name: ArmName, provider: str) -> CostRunner:
    if name.kind == "torch-compile":
        raise UsageError(
            f"{name} would be compiled again for each variant.", f"Measure torch:{name.path}."
        )
    require("torch", extra="torch")
    from exporter.choose.costs.torch_cost_runner import TorchCostRunner

    if not name.path.exists():
        raise CostError(f"{name.path} does not exist.", "Give a Hugging Face folder after torch:.")
    return TorchCostRunner(load_model(str(name.path)), provider)
