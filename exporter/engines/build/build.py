"""From an ONNX file to an engine and the record beside it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from exporter.engines.build.child import run_job
from exporter.engines.build.engine_set import EngineRecord, Reads, sidecar_path
from exporter.engines.build.libraries import (
    LIBRARIES,
    Backend,
    EngineLibrary,
    ask_driver,
    refuse_unbuildable,
    version_of,
)
from exporter.engines.build.logs import Obstacle
from exporter.engines.build.profiles import (
    EngineSource,
    Ranges,
    graph_hashes,
    has_fixed_caches,
    phases_of,
    profile,
    read_source,
    refuse_unknown_axes,
)
from exporter.engines.build.settings import BuildSettings, Logits, Phase, Profile
from exporter.engines.tensors import TensorSpec
from exporter.errors import EngineError, UsageError
from exporter.files import refuse_overwriting
from exporter.progress import QUIET, Progress
from graph_passes.files.placing import staging
from graph_passes.files.storage import load_model
from graph_passes.fusing.cache_in_place import SCATTER
from graph_passes.fusing.logits_to_keep import LogitsToKeepPass
from graph_passes.fusing.prompt_alone import PromptAlonePass

_PASSED_OVER = (
    "the parser passes over its input nonpad_kv_seqlen, without a word; say in the mask what is "
    "filled, as depthcut export --target tensorrt-rtx does"
)
_FILLED_PLACE = 6
DECOMPOSABLE = "TRT_decomposable"


@dataclass(frozen=True)
class Adapted:
    """What a graph was changed to for one engine."""

    changed: bool
    attention: Reads | None  # of caches of fixed length; None where there are none
    logits: Logits | None  # of which positions there are logits; None where there are none


def adapt(model: ir.Model, settings: BuildSettings, phases: Collection[Phase]) -> Adapted:
    """Changes a graph for an engine."""
    attention: Reads | None = None
    if any(node.op_type == SCATTER for node in model.graph):
        # The masks of caches in place are needed but for prompts alone, on empty caches.
        alone = set(phases) == {"prefill"} and settings.logits == "last"
        attention = "new" if alone and PromptAlonePass()(model).modified else "room"
    logits: Logits | None = None
    if any(value.name == "logits" for value in model.graph.outputs):
        logits = settings.kept(phases)
    # A decode step has one position: there is nothing to keep from it.
    cut = logits == "last" and "prefill" in phases
    if cut and not LogitsToKeepPass(1)(model).modified:
        cut, logits = False, "all"
    decomposed = _attentions(model)
    for node in decomposed:  # a builder may write out each that it has no kernel for
        if DECOMPOSABLE not in node.attributes:
            node.attributes.add(ir.AttrInt64(DECOMPOSABLE, 1))
    return Adapted(attention == "new" or cut or bool(decomposed), attention, logits)


def _attentions(model: ir.Model) -> list[ir.Node]:
    """Every Attention of a graph and of the graphs in it."""
    nodes = model.graph.all_nodes()
    return [node for node in nodes if node.op_type == "Attention" and not node.domain]


def ignored_inputs(model: ir.Model) -> list[Obstacle]:
    """The Attentions that are told how many keys are filled, which a parser passes over.

    An engine of such a graph would attend to what is not filled yet.
    """
    return [
        Obstacle(node.name or "", node.op_type, _PASSED_OVER)
        for node in _attentions(model)
        if len(node.inputs) > _FILLED_PLACE and node.inputs[_FILLED_PLACE]
    ]


_DEFAULT = BuildSettings()
_RANGES = Ranges()
_NEW_ENGINE = "engine"
_SHORT = {"attention": "attn", "cross_attention": "cross"}


def build_engines(
    onnx: Path,
    target: Path,
    *,
    phases: Sequence[str] | None = None,  # all that the graph has when None
    split: bool | None = None,
    builds: int = 1,
    ranges: Ranges = _RANGES,
    profiles: Sequence[Profile] | None = None,
    backend: Backend = "tensorrt-rtx",
    settings: BuildSettings = _DEFAULT,
    progress: Progress = QUIET,
) -> list[tuple[Path, EngineRecord]]:
    """Builds an engine for each phase, or one with a profile for each.

    Each appears with its record, or not at all. The builder runs in a process of its own. Precision
    comes from the graph: the network is strongly typed.

    Args:
        onnx: The graph, written with the target ``tensorrt`` or ``tensorrt-rtx``.
        target: The engine's file, or a folder, in which the names are chosen.
        phases: ``prefill``, ``decode``, ``encode``; None: all that the graph has.
        split: An engine for each phase; None: where caches have a fixed length.
        builds: How many engines of each, since builds may differ in speed.
        ranges: The least, usual and largest batch and lengths, in tokens.
        profiles: Optimization profiles in place of those made of phases and ranges.
        backend: The library.
        settings: What the builder is told.
        progress: Hears of each step.

    Returns:
        Each engine's file, and its record.

    Raises:
        BackendError: The library isn't installed.
        EngineError: It refuses the graph, or the build fails.
    """
    refuse_unbuildable(backend, settings.compute_capabilities)
    source = read_source(onnx)
    numbers = [f"b{number + 1}" for number in range(builds)] if builds > 1 else [""]
    groups = [list(profiles)] if profiles else _groups(source.inputs, phases, ranges, split=split)
    whole = sum(map(len, groups)) == len(phases_of(source.inputs))
    named = len(groups) > 1 or bool(split) or (_is_folder(target) and not whole)
    graph = _BuiltGraph(onnx, source, LIBRARIES[backend], settings, progress)
    return [
        graph.build(target, group, "+".join(item.phase for item in group if named), number)
        for group, number in itertools.product(groups, numbers)
    ]


@dataclass(frozen=True)
class _BuiltGraph:
    """What the builds of one graph have in common; the graph is read and hashed once."""

    onnx: Path
    source: EngineSource
    library: EngineLibrary
    settings: BuildSettings
    progress: Progress

    @cached_property
    def made_from(self) -> dict[str, str]:
        return graph_hashes(self.onnx, self.source)

    def build(
        self,
        target: Path,
        profiles: Sequence[Profile],
        phases: str,  # in its file name, as the number is; often empty
        number: str,
    ) -> tuple[Path, EngineRecord]:
        """One engine, by a process of its own."""
        in_folder, begun = _is_folder(target), time.perf_counter()
        place = target / "engine"
        if not in_folder:  # m.engine becomes m-decode-b1.engine
            stem = "-".join(filter(None, [target.stem, phases, number]))
            place = target.with_name(stem + target.suffix)
            self._refuse_own_source(place)
        with staging(place) as staged:
            record = self._built(staged.folder, profiles)
            name = place.name
            if in_folder:
                name = self._name(record.backend_version, phases, number)
            path = place.with_name(name)
            for made in (path, sidecar_path(path)):
                self._refuse_own_source(made)
            result = {"engine": name, "total_s": time.perf_counter() - begun}
            record = record.model_copy(update=result)
            sidecar = record.write(staged.folder / "engine.json")
            staged.place([(sidecar, sidecar_path(path)), (staged.folder / _NEW_ENGINE, path)])
        return path, record

    def _built(self, stage: Path, profiles: Sequence[Profile]) -> EngineRecord:
        """Has an engine built in a folder; its name is not on record yet."""
        model, version = load_model(self.onnx), version_of(self.library.backend) or "0.0"
        if ignored := ignored_inputs(model):
            raise self._not_parsed(ignored, version)
        phases = [profile.phase for profile in profiles]
        adapted, graph = adapt(model, self.settings, phases), stage.resolve() / "graph.onnx"
        if adapted.changed:
            graph.write_bytes(ir.to_proto(model).SerializeToString())
        built = stage.resolve() / _NEW_ENGINE
        request = {
            "job": "build",
            "onnx": str(self.onnx.absolute()),
            "graph": str(graph) if adapted.changed else None,
            "engine": str(built),
            "settings": asdict(self.settings),
            "profiles": [profile.model_dump() for profile in profiles],
        }
        what = f"build {' and '.join(phases)} with {self.library.backend}"
        result = run_job(self.library, request, self.progress, what)
        if obstacles := [Obstacle(**obstacle) for obstacle in result.pop("obstacles")]:
            raise self._not_parsed(obstacles, result["backend_version"])
        return EngineRecord(
            made_from=self.made_from,
            engine=built.name,
            engine_bytes=built.stat().st_size,
            backend=self.library.backend,
            built_on=_this_card(),
            settings=self.settings,
            precision=self.source.precision,
            plan=self.source.plan,
            profiles=list(profiles),
            attention=adapted.attention,
            logits=adapted.logits,
            total_s=0.0,
            **result,
        )

    def _not_parsed(self, obstacles: Sequence[Obstacle], version: str) -> EngineError:
        more = f" ({len(obstacles) - 1} more)" if len(obstacles) > 1 else ""
        return EngineError(
            f"{self.onnx} does not parse in {self.library.backend} {version}: "
            f"{obstacles[0]}{more}.",
            "Operators of ONNX Runtime don't: build from the graph before it was fused, or "
            f"depthcut export --target {self.library.backend}. bf16 needs sm80 or newer.",
            code="not-parsed",
        )

    def _refuse_own_source(self, path: Path) -> None:
        refuse_overwriting(path, [self.onnx, *self.source.weights])

    def _name(self, version: str, phases: str, number: str) -> str:
        """A file name that says what an engine is: ``smollm2-attn8-fp16-sm80-rtx1.7.1.engine``."""
        onnx = self.onnx
        stem = onnx.stem if onnx.stem != "model" else onnx.parent.resolve().name
        cuts = Counter(_SHORT.get(item["kind"], item["kind"]) for item in self.source.plan)
        here = _this_card().get("compute_capability", "")
        cards = "+".join(self.settings.compute_capabilities) or here
        library = self.library.short + ".".join(version.split(".")[:3])
        cut = [f"{kind}{count}" for kind, count in cuts.items()]
        parts = [stem, *cut, self.source.precision, phases, cards, library, number]
        return "-".join(filter(None, parts)) + ".engine"


def _is_folder(target: Path) -> bool:
    """Whether an engine is to be named after what it is, in a folder."""
    return target.is_dir() or not target.suffix


def _groups(
    inputs: Sequence[TensorSpec],
    phases: Sequence[str] | None,
    ranges: Ranges,
    *,
    split: bool | None,
) -> list[list[Profile]]:
    """The profiles of each engine."""
    names = list(phases or phases_of(inputs))
    if len(set(names)) < len(names):
        raise UsageError(f"A phase is named twice: {', '.join(names)}.", code="named-twice")
    refuse_unknown_axes(inputs, ranges)
    wanted = [profile(inputs, phase, ranges) for phase in names]
    for_each = has_fixed_caches(inputs) if split is None else split
    return [[item] for item in wanted] if for_each else [wanted]


def _this_card() -> dict[str, str]:
    driver = ask_driver()
    if driver.problem:
        return {}
    card = driver.devices[0]
    return {
        "gpu": card.name,
        "compute_capability": card.compute_capability,
        "driver_cuda": driver.cuda_version,
    }
