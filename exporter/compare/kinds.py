"""What an arm is, told by how it is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifacts import FLOAT_BASELINE, FLOAT_CANDIDATE, EngineFacts
from exporter.compare.arms import ComparedArm
from exporter.compare.options import CompareOptions
from exporter.compare.sequences import JudgedPairs, open_stack_arm
from exporter.engines.build.build import build_engines
from exporter.engines.build.engine_set import (
    EngineRecord,
    EngineSet,
    built_for,
    find_builds,
    find_engines,
    names_engines,
)
from exporter.engines.build.libraries import ask_driver
from exporter.engines.build.settings import Profile, ShapeRange
from exporter.engines.decoding.verify import believed, refuse_other_source, source_of
from exporter.engines.runners.base import Runner
from exporter.engines.runners.registry import ONNX, RUNNERS, named_backend, open_runner
from exporter.engines.runners.tensorrt import TensorRtRunner, Turns
from exporter.engines.tensors import byte_count, numpy_dtype
from exporter.errors import ComparisonError, DepthcutError, ExportError, UsageError
from exporter.files import scratch_folder, sha256_files
from exporter.models.graph_facts import CACHE_INPUT, GraphFacts, read_facts
from exporter.models.loading.model_source import LoadedModel, load_model
from exporter.models.model_folder import (
    ModelFolder,
    find_model,
    holds_stacks,
    names_image_classifier,
    read_config,
)
from exporter.models.texts.sources import TextSource
from exporter.optional import require
from exporter.progress import QUIET, Progress
from graph_passes.plan_record import PLAN_KEY

if TYPE_CHECKING:
    from exporter.engines.runners.pytorch import TorchRunner


_BY_OTHERS = "; what was measured is ONNX Runtime on the ONNX files that they were built from"
_UNMEASURED = (
    "; nothing was measured, since an ONNX file that they were built from is not beside them: "
    "name both with --engine-onnx"
)


def _refuse_built_differently(baseline: EngineSet, candidate: EngineSet) -> None:
    """What differs but for the model would be taken for what the cut has brought."""
    builds = (baseline, candidate)
    ways = [_ways(build) for build in builds]
    different = [name for name, way in ways[0].items() if way != ways[1][name]]
    shared = {tensor.name for tensor in baseline.inputs} & {
        tensor.name for tensor in candidate.inputs
    }
    profiles = [[_kept(slot.profile, shared) for slot in build.slots] for build in builds]
    if profiles[0] != profiles[1]:
        different.append("profiles")
    reads = [{record.attention for record in build.records} - {None} for build in builds]
    if all(reads) and reads[0] != reads[1]:
        different.append("reading of caches")
    if different:
        raise ComparisonError(
            f"{baseline.name} and {candidate.name} were built in different ways: their "
            f"{' and '.join(different)} differ.",
            "Build both with the same options of depthcut build.",
            code="different-engines",
        )


def _ways(build: EngineSet) -> dict[str, object]:
    first = build.records[0]
    return {
        "libraries": (first.backend, first.backend_version),
        "settings": first.settings,
        "numbers of engines": len(build.records),
    }


def _kept(profile: Profile, names: set[str]) -> tuple[str, dict[str, ShapeRange]]:
    return profile.phase, {name: span for name, span in profile.shapes.items() if name in names}


def _gives_all(build: EngineSet) -> bool:
    """Whether its answers can be judged: at all positions, with padding, on filled caches."""
    return all(record.logits != "last" and record.attention != "new" for record in build.records)


@contextmanager
def _judge(
    build: EngineSet, onnx: Path | None, progress: Progress, turns: Turns | None
) -> Iterator[Runner]:
    """An engine of the same model that gives all logits and reads all of its caches.

    It takes turns where the arms do.
    """
    first = build.records[0]
    if onnx is None:
        raise ComparisonError(
            f"{build.name} gives the logits of the last position alone, and the ONNX file that it "
            "was built from is not beside it: so its accuracy can't be measured.",
            "Name it with --engine-onnx, or build with --logits all.",
            code="last-logits-only",
        )
    settings = replace(first.settings, logits="all")
    with scratch_folder("judge") as folder:
        ((engine, _),) = build_engines(
            onnx,
            folder / "judge.engine",
            profiles=[slot.profile for slot in build.slots],
            backend=first.backend,
            settings=settings,
            progress=progress,
        )
        judge = TensorRtRunner(believed(find_engines(engine), onnx, progress))
        judge.turns = turns
        with judge:
            yield judge


def open_file_arm(
    path: Path, options: CompareOptions, *, threads: int, backend: str = ONNX
) -> ComparedArm:
    """A model's file on a backend among :data:`exporter.engines.runners.registry.RUNNERS`."""
    files = RUNNERS[backend]
    folder = files.folder(path)
    runner = open_runner(backend, folder.onnx, provider=options.provider, threads=threads)
    return ComparedArm((runner,), folder, files.facts(folder.onnx))


def _onnx_of(build: EngineSet, given: Path | None) -> Path | None:
    """The ONNX file that an engine was built from; None where it isn't near."""
    if given is None:
        return source_of(build)
    onnx = find_model(given).onnx
    refuse_other_source(onnx, build)
    return onnx


def _described(build: EngineSet, onnx: Path | None) -> tuple[ModelFolder, GraphFacts]:
    """Where the engines' config and tokenizer are, and what is known of them."""
    folder = ModelFolder.beside(build.paths[0], (onnx or build.paths[0]).parent)
    return folder, _graph_facts(build, None if onnx is None else read_facts(onnx))


def _graph_facts(build: EngineSet, source: GraphFacts | None) -> GraphFacts:
    records, first = build.records, build.records[0]
    hashes = [record.engine_sha256 for record in records]
    return GraphFacts(
        file_bytes=sum(record.engine_bytes for record in records),
        sha256=hashes[0] if len(hashes) == 1 else sha256_files(build.paths, build.paths[0].parent),
        parameters=source.parameters if source else 0,
        nodes=source.nodes if source else 0,
        precision=first.precision,
        kv_cache_bytes_per_token=_bytes_per_token(first),
        vocabulary=source.vocabulary if source else _vocabulary(first),
        metadata={PLAN_KEY: json.dumps(first.plan)} if first.plan else {},
    )


def _bytes_per_token(record: EngineRecord) -> int:
    return sum(
        byte_count(numpy_dtype(tensor.dtype), (tensor.shape[1], tensor.shape[-1]))
        for tensor in record.inputs
        if CACHE_INPUT.fullmatch(tensor.name)
    )


def _vocabulary(record: EngineRecord) -> int | None:
    sizes = [output.shape[-1] for output in record.outputs if output.name == "logits"]
    return sizes[0] if sizes and sizes[0] > 0 else None


def _facts_of(path: Path, record: EngineRecord) -> EngineFacts:
    same = ("engine_bytes", "backend", "backend_version", "precision", "memory_bytes", "check")
    return EngineFacts(
        path=str(path),
        sha256=record.engine_sha256,
        built_for=built_for(record),
        **{name: getattr(record, name) for name in same},
    )


_ENGINE = "engine"
_PREFIXES = ("torch", "torch-compile")
_FLOATS = (FLOAT_BASELINE, FLOAT_CANDIDATE)
_TAKEN = ("baseline", "candidate", *_FLOATS)
"""Names that a reference can't have in the report."""


@dataclass(frozen=True)
class ArmName:
    """An arm as it was asked for."""

    kind: str
    path: Path

    @classmethod
    def of(cls, text: Path | str) -> ArmName:
        """Reads ``PATH`` or ``KIND:PATH``; a file of such a name is written ``./torch:x``."""
        kind, colon, rest = str(text).partition(":")
        if colon and kind in _PREFIXES:
            return cls(kind, Path(rest))
        backend, path = named_backend(text)
        return cls(backend or (_ENGINE if names_engines(path) else ONNX), path)

    @property
    def prefix(self) -> str:
        """What is written before its path."""
        return "" if self.kind in (_ENGINE, ONNX) else f"{self.kind}:"

    @property
    def is_torch(self) -> bool:
        """Whether PyTorch runs it."""
        return self.kind in _PREFIXES

    @property
    def in_stacks(self) -> bool:
        """Whether it is an encoder-decoder, whose folder holds three graphs."""
        return holds_stacks(self.path)

    def __str__(self) -> str:
        return f"{self.prefix}{self.path}"


def same_kind(
    baseline: Path | str, candidate: Path | str, others: Sequence[Path | str] = ()
) -> tuple[ArmName, ArmName]:
    """What the two arms are; none stands beside an encoder-decoder but others of its kind."""
    first, second, *further = map(ArmName.of, [baseline, candidate, *others])
    for name in [second, *(further if first.in_stacks else ())]:
        runs = first.in_stacks and name.kind != ONNX
        if runs or (first.kind, first.in_stacks) != (name.kind, name.in_stacks):
            raise ComparisonError(
                f"{first} and {name} are of different kinds: the difference in speed would not "
                "be the effect of the cut.",
                "Compare two of a kind, and name the third as a --reference; an encoder-decoder's "
                "folder only with other such folders that depthcut export has written.",
                code="different-kinds",
            )
    return first, second


def reads_images(name: ArmName) -> bool:
    """Whether the config of an arm names a classifier of images; nothing is loaded for it."""
    home = name.path if name.path.is_dir() else name.path.parent
    try:
        return names_image_classifier(read_config(home))
    except DepthcutError:  # told where the arm is opened
        return False


def open_arms(
    pair: Sequence[ArmName],
    options: CompareOptions,
    *,
    threads: int,
    onnx: tuple[Path, Path] | None = None,
    floats: tuple[Path | str, Path | str] | None = None,
    further: Sequence[Path | str] = (),
    judged_on: Sequence[TextSource] = (),
    progress: Progress = QUIET,
) -> dict[str, ComparedArm]:
    """Finds the files of all arms, the pair's first; their runners are not entered yet."""
    opening = _Opening(options, threads, judged_on, progress)
    if pair[0].kind == _ENGINE:
        _refuse_built_differently(*(find_builds(name.path)[0] for name in pair))
    elif onnx is not None:
        raise UsageError(
            "--engine-onnx is for engines, and these are not engines.",
            code="onnx-without-engine",
        )
    given = onnx or (None, None)
    sides = [opening.arm(name, source) for name, source in zip(pair, given, strict=True)]
    if why := next((side.not_run for side in sides if not side.builds), None):
        sides = [  # one arm alone tells nothing
            ComparedArm((), *_described(find_builds(name.path)[0], None), side.engines, why)
            for name, side in zip(pair, sides, strict=True)
        ]
    quantized = True if floats else None
    arms = {
        title: replace(side, pruned=title == "candidate", quantized=quantized)
        for title, side in zip(("baseline", "candidate"), sides, strict=True)
    }
    for title, name in zip(_FLOATS, same_kind(*floats) if floats else (), strict=False):
        arms[title] = replace(opening.arm(name), pruned=title == FLOAT_CANDIDATE, quantized=False)
    names = [ArmName.of(text) for text in further]
    precision = arms.get(FLOAT_BASELINE, arms["baseline"]).facts.precision
    for title, name in zip(_titles(names), names, strict=True):
        arms[title] = replace(opening, precision=precision).arm(name)
        if not arms[title].builds or arms[title].not_run:
            raise ComparisonError(
                f"The reference {name.path} can't be timed here: {arms[title].not_run}.",
                "Leave it out; of the two that are compared, engines are described without a GPU "
                "too.",
                code="engine-not-runnable",
            )
    return arms


@dataclass(frozen=True)
class _Opening:
    """How arms are opened."""

    options: CompareOptions
    threads: int
    judged_on: Sequence[TextSource]
    progress: Progress
    precision: str | None = None  # None: as its files have it

    def arm(self, name: ArmName, onnx: Path | None = None) -> ComparedArm:
        """One of any kind; ``onnx``: what an engine was built from, if that is elsewhere."""
        if name.in_stacks:
            return self._stacks(name)
        if name.kind == _ENGINE:
            return self._engine(name.path, onnx)
        return self._torch(name) if name.is_torch else self._file(name)

    def _stacks(self, name: ArmName) -> ComparedArm:
        (pairs,) = self.judged_on
        assert isinstance(pairs, JudgedPairs)
        example = pairs.example()
        return open_stack_arm(name.path, self.options, threads=self.threads, example=example)

    def _engine(self, path: Path, onnx: Path | None) -> ComparedArm:
        """Its builds; the ONNX file behind them, described beside them, where nothing runs them."""
        builds = find_builds(path)
        source = _onnx_of(builds[0], onnx)
        builds = [believed(build, source, self.progress) for build in builds]
        engines = tuple(
            _facts_of(path, record)
            for build in builds
            for path, record in zip(build.paths, build.records, strict=True)
        )
        problem = ask_driver().problem
        built = f"built, not run: {problem}"
        if problem and source is not None:
            arm = open_file_arm(source, self.options, threads=self.threads)
            return replace(arm, engines=engines, not_run=built + _BY_OTHERS)
        folder, facts = _described(builds[0], source)
        if problem:
            return ComparedArm((), folder, facts, engines, built + _UNMEASURED)
        runners = tuple(TensorRtRunner(build) for build in builds)
        judge = None if _gives_all(builds[0]) else partial(_judge, builds[0], source)
        return ComparedArm(runners, folder, facts, engines, judge=judge)

    def _torch(self, name: ArmName) -> ComparedArm:
        return open_torch_arm(
            name.path,
            compiled=name.kind == "torch-compile",
            provider=self.options.provider,
            threads=self.threads,
            precision=self.precision,
        )

    def _file(self, name: ArmName) -> ComparedArm:
        arm = open_file_arm(name.path, self.options, threads=self.threads, backend=name.kind)
        return replace(arm, prefix=name.prefix)


def open_arm(name: ArmName, options: CompareOptions, progress: Progress = QUIET) -> ComparedArm:
    """One arm by itself, of any kind that reads no texts."""
    return _Opening(options, 1, (), progress).arm(name)


def _titles(names: Sequence[ArmName]) -> list[str]:
    """What the report calls each: the end of its path, or all of it where that isn't its alone."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UsageError(f"The reference {twice} is given twice.", code="named-twice")
    ends = [f"{name.prefix}{name.path.name}" for name in names]
    return [
        end if (*ends, *_TAKEN).count(end) == 1 else _whole(name)
        for end, name in zip(ends, names, strict=True)
    ]


def _whole(name: ArmName) -> str:
    return f"./{name}" if str(name) in _TAKEN else str(name)


_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def open_torch_arm(
    path: Path, *, compiled: bool, provider: str, threads: int, precision: str | None
) -> ComparedArm:
    """Loads a model of the Hugging Face kind."""
    require("torch", extra="torch")
    from exporter.engines.runners.pytorch import TorchRunner

    if not path.exists():
        raise ComparisonError(
            f"{path} does not exist.",
            "Give a Hugging Face folder or a GGUF file after torch:.",
            code="file-missing",
        )
    loaded = load_model(str(path), dtype=_DTYPES.get(precision or "", "float32"), pruned=True)
    try:
        runner = TorchRunner(loaded.model, compiled=compiled, provider=provider, threads=threads)
    except ExportError as error:
        raise ComparisonError(f"{path} can't be an arm: {error.message}") from error
    return torch_arm(loaded, path, runner, "torch-compile:" if compiled else "torch:")


def torch_arm(loaded: LoadedModel, path: Path, runner: TorchRunner, prefix: str) -> ComparedArm:
    """A loaded model on its runner."""
    folder = ModelFolder.beside(path, path, _config(loaded))
    return ComparedArm((runner,), folder, _facts(loaded, runner), prefix=prefix)


def _config(loaded: LoadedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(loaded.model.config.to_json_string())
    return {**config, "architectures": [loaded.ref.architecture]}


def _facts(loaded: LoadedModel, runner: TorchRunner) -> GraphFacts:
    model, interface = loaded.model, runner.interface
    per_token = sum(slot.heads * (slot.key_size + slot.value_size) for slot in interface.cache)
    table = (
        getattr(model.get_input_embeddings(), "weight", None) if interface.image is None else None
    )
    dtype = str(model.dtype).removeprefix("torch.")
    return GraphFacts(
        file_bytes=sum(path.stat().st_size for path in _weights(loaded.path)),
        sha256=loaded.ref.sha256,
        parameters=sum(weight.numel() for weight in model.parameters()),
        nodes=0,
        precision=next(short for short, name in _DTYPES.items() if name == dtype),
        kv_cache_bytes_per_token=per_token * model.dtype.itemsize,
        vocabulary=None if table is None else table.shape[0],
        metadata={},
    )


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
