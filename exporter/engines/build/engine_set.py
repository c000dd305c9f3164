"""The engines that serve one model together: one, or one for each phase."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from exporter.artifacts import Artifact, EngineCheck, Record
from exporter.engines.build.libraries import LIBRARIES, Device, EngineLibrary
from exporter.engines.build.settings import BuildSettings, End, Logits, Phase, Profile
from exporter.engines.tensors import TensorSpec, numpy_dtype, written_shape
from exporter.errors import ArtifactError, BackendError, EngineError
from exporter.files import sha256_file
from exporter.models.graph_facts import CACHE_INPUT

Reads = Literal["new", "room"]


class EngineTensor(Record):
    """A :class:`TensorSpec` as it is on record; -1 stands for a free size."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> EngineTensor:
        """What is put on record of an input or output; the names of its sizes are not."""
        shape = tuple(size if isinstance(size, int) else -1 for size in spec.shape)
        return cls(name=spec.name, dtype=spec.dtype.name, shape=shape)

    @property
    def spec(self) -> TensorSpec:
        """The tensor."""
        shape = tuple(None if size < 0 else size for size in self.shape)
        return TensorSpec(self.name, numpy_dtype(self.dtype), shape)


class EngineRecord(Artifact):
    """The file beside an engine.

    ``built_on`` is the card and the driver's CUDA version, if there was one; ``plan`` what was cut
    out of the graph. ``layers`` counts those that the builder made and that do real work, by type.
    ``attention`` is what is read of caches of fixed length: a prompt's own new positions, or the
    room with a mask. ``memory_bytes`` has the ``weights``, those of each profile counted, and the
    scratch memory ``activation``. With ``fixed_addresses`` TensorRT-RTX gives a small graph's bytes
    again.
    """

    kind: Literal["engine"] = "engine"
    engine: str
    engine_sha256: str
    engine_bytes: int
    backend: Literal["tensorrt", "tensorrt-rtx"]
    backend_version: str
    built_on: dict[str, str]
    settings: BuildSettings
    precision: str
    plan: list[dict[str, Any]]
    profiles: Annotated[list[Profile], Field(min_length=1)]
    inputs: list[EngineTensor]
    outputs: list[EngineTensor]
    attention: Reads | None = None
    logits: Logits | None = None
    check: EngineCheck | None = None
    network_layers: int
    layers: dict[str, int]
    memory_bytes: dict[str, int]
    fixed_addresses: bool
    parse_s: float
    build_s: float
    total_s: float

    @property
    def phases(self) -> list[Phase]:
        """What it serves, by profile number."""
        return [profile.phase for profile in self.profiles]

    def provider_options(self, cache: Path) -> dict[str, str]:
        """Options for ONNX Runtime's provider of the same library, to run the ONNX file by itself.

        Told the profiles, it builds once for all of their shapes, and finds that in the folder
        ``cache`` again.
        """
        rtx, folder = self.backend == "tensorrt-rtx", str(cache)
        options = {}
        for key, end in (("min", "low"), ("opt", "usual"), ("max", "high")):
            shapes = [
                f"{name}:{written_shape(getattr(span, end))}"
                for profile in self.profiles
                for name, span in profile.shapes.items()
            ]
            options[f"{'nv' if rtx else 'trt'}_profile_{key}_shapes"] = ",".join(shapes)
        if rtx:
            several = str(int(len(self.profiles) > 1))
            return options | {"nv_multi_profile_enable": several, "nv_runtime_cache_path": folder}
        for what in ("engine", "timing"):
            options |= {f"trt_{what}_cache_enable": "1", f"trt_{what}_cache_path": folder}
        halves = {"fp16", "bf16"} & {self.precision.partition("-")[0]}
        return options | {f"trt_{half}_enable": "1" for half in halves}


def sidecar_path(engine: Path) -> Path:
    """Where an engine's record stands."""
    return engine.with_name(engine.name + ".json")


def read_sidecar(engine: Path) -> EngineRecord:
    """Reads an engine's record and holds the engine against it, before anyone deserialises it."""
    if not engine.is_file():
        raise EngineError(f"The engine {engine} does not exist.", code="file-missing")
    path = sidecar_path(engine)
    if not path.is_file():
        raise EngineError(
            f"{engine} has no {path.name} beside it, so it is unknown what it was built for.",
            "Build it with depthcut build, and keep the two files together.",
            code="wrong-hash",
        )
    try:
        record = EngineRecord.read(path, named=False)
    except ArtifactError as error:  # one of an older version's, for instance
        error.hint = error.hint or "Build the engine again."
        raise
    size = engine.stat().st_size
    if size != record.engine_bytes or sha256_file(engine) != record.engine_sha256:
        raise EngineError(
            f"{engine}, {size} bytes, is not the engine that {path.name} is for, "
            f"{record.engine_bytes} bytes.",
            "It may be cut off, or the two files don't belong together: build it again.",
            code="wrong-hash",
        )
    return record


def refuse_wrong(records: Sequence[EngineRecord]) -> None:
    """Refuses engines that differ from ONNX Runtime, as their records say."""
    for record in records:
        if (check := record.check) is not None and not check.passed:
            raise EngineError(
                f"{record.engine} differs from ONNX Runtime on {check.card}: {check.worst} is off "
                f"by {check.error:.2g} of its size; {check.tolerance:.2g} is allowed.",
                "Build it again, by another version of the library; depthcut verify-engine checks "
                "it anew.",
                code="engine-differs",
            )


def refuse_mismatch(record: EngineRecord, version: str, devices: Sequence[Device]) -> None:
    """Refuses an engine that this machine can't load, in words."""
    here = devices[0].compute_capability if devices else "no GPU"
    targets = record.settings.compute_capabilities or _card(record)
    same_version = record.backend_version == version
    if same_version and (not targets or here in targets):
        return
    hint = "Build it again with the version that is installed here."
    if same_version and LIBRARIES[record.backend].builds_without_gpu:
        hint = f"Build it with --compute-capability {here}."
    elif same_version:
        hint = "Build it on a card of this kind."
    raise EngineError(
        f"{record.engine} was built for {built_for(record)} by {record.backend} "
        f"{record.backend_version}; this is {here} with {version}.",
        hint,
        code="other-card",
    )


def other_card(record: EngineRecord, card: str) -> str:
    """A note about an engine of TensorRT that was built on a card of another name; else empty."""
    built_on = record.built_on.get("gpu", card)
    if record.backend != "tensorrt" or built_on == card:
        return ""
    return f"{record.engine} was built on {built_on} and runs on {card}: it may be slower, or fail"


def built_for(record: EngineRecord) -> str:
    """The cards that an engine is for, in words."""
    targets = record.settings.compute_capabilities or _card(record)
    return ", ".join(targets) or "the cards that the library supports by default"


def _card(record: EngineRecord) -> tuple[str, ...]:
    """The card that it was built on, where it is tied to its compute capability."""
    card = record.built_on.get("compute_capability", "")
    return (card,) if record.backend == "tensorrt" and card else ()


Shape = tuple[int, ...]

SUFFIXES = (".engine", ".plan")
"""What engines are called; in a folder only such files are looked at."""

_LENGTH = 2  # a cache's axis
_NUMBERED = re.compile(r"-b([0-9]{1,4})$")  # as exporter.engines.build.build marks one
_NONE_BUILT = f"Build one with depthcut build; engines are called *{' or *'.join(SUFFIXES)}."
_OWN_FOLDER = "or put the engines of each model in a folder of their own."
_OF_ONE_MODEL: dict[str, Callable[[EngineRecord], object]] = {
    "backends": lambda record: record.backend,
    "library versions": lambda record: record.backend_version,
    "graphs": lambda record: record.made_from,
    "inputs or outputs": lambda record: [
        (tensor.name, tensor.dtype, len(tensor.shape))
        for tensor in (*record.inputs, *record.outputs)
    ],
}
_OF_ONE_BUILD: dict[str, Callable[[EngineRecord], object]] = {
    "settings": lambda record: record.settings,
    "profiles": lambda record: record.profiles,
}


@dataclass(frozen=True)
class Slot:
    """One profile of one of the engines."""

    engine: int
    number: int
    profile: Profile


@dataclass(frozen=True)
class EngineSet:
    """Engines of one graph, for phases of which no two are alike."""

    paths: tuple[Path, ...]
    records: tuple[EngineRecord, ...]

    @property
    def name(self) -> str:
        """The file, or the files, as messages name them."""
        return " and ".join(str(path) for path in self.paths)

    @property
    def library(self) -> EngineLibrary:
        """The library that runs them."""
        return LIBRARIES[self.records[0].backend]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every profile of every engine."""
        return tuple(
            Slot(place, number, profile)
            for place, record in enumerate(self.records)
            for number, profile in enumerate(record.profiles)
        )

    @property
    def inputs(self) -> tuple[EngineTensor, ...]:
        """What goes in; the same for all of them."""
        return tuple(self.records[0].inputs)

    @property
    def outputs(self) -> tuple[EngineTensor, ...]:
        """What comes out."""
        return tuple(self.records[0].outputs)

    @property
    def steady(self) -> frozenset[Phase]:
        """The phases whose runs have the shapes and the addresses of the run before.

        Decode steps on caches of fixed length, and runs without a cache, since nobody knows other
        shapes. Prompts differ, and a cache that grows brings a new shape at every step.
        """
        caches = [tensor for tensor in self.inputs if CACHE_INPUT.fullmatch(tensor.name)]
        grows = any(min(cache.shape[_LENGTH:]) < 0 for cache in caches)
        return frozenset({"encode"} if grows else {"encode", "decode"})

    def shapes(self, slot: Slot, end: End) -> dict[str, Shape]:
        """By input, the smallest, usual or largest shape that a profile takes."""
        spans = slot.profile.shapes
        return {
            tensor.name: spans[tensor.name].at(end) if tensor.name in spans else tensor.shape
            for tensor in self.inputs
        }


def holds_engines_alone(folder: Path) -> bool:
    """Whether a folder holds engines and no ONNX file, so that nobody needs to say which."""
    return folder.is_dir() and bool(_engine_files(folder)) and not any(folder.glob("*.onnx"))


def names_engines(path: Path) -> bool:
    """Whether a path names an engine, or a folder of engines alone."""
    if path.is_dir():
        return holds_engines_alone(path)
    return path.suffix in SUFFIXES or (path.suffix != ".onnx" and sidecar_path(path).is_file())


def find_engines(path: Path | Sequence[Path]) -> EngineSet:
    """Reads the records of an engine or a folder's engines, and holds files against them."""
    if not isinstance(path, Path):
        paths = list(path)
    else:
        paths = _engine_files(path) if path.is_dir() else [path]
    if not paths:
        raise EngineError(f"{path} holds no engine.", _NONE_BUILT, code="no-engine")
    engines = EngineSet(tuple(paths), tuple(read_sidecar(item) for item in paths))
    counts = Counter(slot.profile.phase for slot in engines.slots)
    twice = next((phase for phase, count in counts.items() if count > 1), None)
    if twice and len(paths) > 1:
        raise EngineError(
            f"There is more than one engine for {twice}: {engines.name}.",
            "They are builds of one model: name one's file, or leave one in the folder."
            if any(map(_build_number, paths))
            else f"Name the engine's file, {_OWN_FOLDER}",
            code="different-engines",
        )
    _refuse_different(engines.name, [engines.records], _OF_ONE_MODEL)
    return engines


def find_builds(path: Path) -> list[EngineSet]:
    """The builds of one model: engines that are alike but for the numbers in their names."""
    if path.is_file() or not (path.is_dir() or is_pattern(path)):
        return [find_engines(path)]
    folder, pattern = (path, "*") if path.is_dir() else (path.parent, path.name)
    numbered: dict[int, list[Path]] = {}
    for file in _engine_files(folder) if folder.is_dir() else []:
        if file.match(pattern):
            numbered.setdefault(_build_number(file), []).append(file)
    if not numbered:
        raise EngineError(f"There is no engine {path}.", _NONE_BUILT, code="no-engine")
    builds = [find_engines(numbered[number]) for number in sorted(numbered)]
    alike = list(zip_longest(*(build.records for build in builds)))
    _refuse_different(str(path), alike, _OF_ONE_MODEL | _OF_ONE_BUILD)
    return builds


def is_pattern(path: Path) -> bool:
    """Whether a path stands for all engines whose names are like its own."""
    return path.suffix in SUFFIXES and any(letter in path.name for letter in "*?[")


def _build_number(engine: Path) -> int:
    match = _NUMBERED.search(engine.stem)
    return int(match[1]) if match else 0


def _engine_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def _refuse_different(
    where: str,
    groups: Sequence[Sequence[EngineRecord | None]],  # None stands for one that a build lacks
    facts: Mapping[str, Callable[[EngineRecord], object]],
) -> None:
    """Refuses records that are to be alike, and differ in one of the facts."""
    for records in groups:
        present = [record for record in records if record is not None]
        different = "numbers of engines" if len(present) < len(records) else ""
        for what, fact in facts.items():
            if not different and any(fact(record) != fact(present[0]) for record in present):
                different = what
        if different:
            raise EngineError(
                f"The engines in {where} are not of one model: their {different} differ.",
                f"Build them by one call of depthcut build, {_OWN_FOLDER}",
                code="different-engines",
            )


def choose_profile(
    name: str,
    profiles: Sequence[Profile],
    shapes: Mapping[str, Shape],
    phase: Phase | None = None,  # None where the caller can't know it
) -> int:
    """The number of the profile that runs a call: of those that hold it, the tightest.

    That is the one with the fewest free sizes, and among equals the smaller one: a decode profile
    serves a step better than a prefill profile that holds it, too.
    """
    numbers = [number for number, item in enumerate(profiles) if phase in (None, item.phase)]
    outside = {number: profiles[number].outside(shapes) for number in numbers}
    fitting = [number for number in numbers if not outside[number]]
    if fitting:
        return min(fitting, key=lambda number: profiles[number].looseness)
    if not numbers:
        raise no_phase(name, str(phase))
    first = min(outside.values(), key=len)[0]
    held = ", ".join(
        f"{profile.phase} takes {profile.shapes[first]}"
        for profile in (profiles[number] for number in numbers)
        if first in profile.shapes
    )
    raise BackendError(
        f"{name}: no profile holds this call: {first} is {written_shape(shapes[first])}, and "
        f"{held}.",
        "Ask for less, or build it with another --batch-range, --prompt-range or --context-range.",
        code="no-profile-fits",
    )


def no_phase(name: str, phase: str) -> BackendError:
    """The error for engines that serve another phase alone."""
    return BackendError(
        f"{name} has no profile for {phase}.",
        "Build it for all phases, or put the engines of all of them in one folder.",
        code="no-profile-fits",
    )
