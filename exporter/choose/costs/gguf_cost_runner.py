"""A GGUF file in llama.cpp, and variants of it as ``depthcut gguf`` cuts them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from exporter.artifacts import PlannedDeletion
from exporter.artifacts.plans.loaded import LoadedPlan
from exporter.artifacts.replacement_file import Replacements
from exporter.choose.costs.cost_runners import random_replacement, subjects
from exporter.choose.costs.graph_sizes import CacheSize, GraphSizes, SublayerSize
from exporter.choose.costs.grouping import Variant
from exporter.compare.timing.subjects import TimedArm
from exporter.cut.gguf.layers import place_in_layer, sublayers_of
from exporter.cut.gguf.surgery import cut_gguf
from exporter.engines.runners.registry import RUNNERS, open_runner
from exporter.errors import CostError
from exporter.files import sha256_bytes
from exporter.models.gguf.facts import CACHE_BYTES, gguf_facts
from exporter.models.gguf.header import Tensor
from exporter.models.gguf.layer_sizes import HIDDEN, sizes_of
from exporter.models.gguf.model_files import read_model
from graph_passes.replacements import ReplacementTensors
from graph_passes.types import SublayerRef

_BACKEND = "llama.cpp"
_LETTERS = 12
_FIRST = SublayerRef(0, "attention")
"""llama.cpp takes the width of all heads from it, so it can't go."""


@dataclass
class GgufCostRunner:
    """A GGUF file; see :class:`exporter.choose.costs.cost_runners.CostRunner`.

    Attributes:
        model: The file, or any of its shards.
        folder: Where variants are written for a while.
        device: ``cpu``.
        threads: CPU threads.
        rank: Of linear maps; llama.cpp multiplies them out.
    """

    model: Path
    folder: Path
    device: str = "cpu"
    threads: int = 1
    rank: int | None = None
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
        """What its sublayers hold, their norms included.

        Raises:
            SurgeryError: The file's arrays don't fit its layers.
            CostError: It has no sublayer that can be cut.
        """
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
        """The whole file and one with some sublayers cut, loaded while the block runs.

        Raises:
            SurgeryError: llama.cpp can't hold the cut.
        """
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
        told = gguf_facts(self.model).vocabulary
        if told is None:
            raise CostError(f"{self.model} has no table of tokens.", code="no-vocabulary")
        return told

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
        drawn = random_replacement(hidden, "linear", None)
        one = ReplacementTensors(np.zeros(hidden, np.float32), drawn.weight)
        tensors = {member.name: one for member in variant.members}
        numbers = Replacements(place / "random.safetensors", sha256_bytes(b"random"), tensors)
        return LoadedPlan.of(deletions, numbers)


def _sized(ref: SublayerRef, tensors: Sequence[Tensor], cached: int) -> SublayerSize:
    norms = [tensor for tensor in tensors if tensor.name.endswith("_norm.weight")]
    count, norm_count = (sum(math.prod(t.shape) for t in each) for each in (tensors, norms))
    held, norms_held = (sum(t.nbytes for t in each) for each in (tensors, norms))
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
