"""ENGINE.json: what an engine is, for whom it was built, and whether it may be loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from exporter.artifacts import Artifact, Record
from exporter.engines.build.driver import Device
from exporter.engines.build.libraries import LIBRARIES
from exporter.engines.build.settings import BuildSettings, Logits, Phase, Profile
from exporter.engines.tensors import TensorSpec, numpy_dtype
from exporter.errors import EngineError
from exporter.files import sha256_file

_REMOVED = ("strip_weights", "refittable")
"""Settings that records of earlier versions have."""


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
        """The tensor.

        Raises:
            BackendError: numpy has no such type.
        """
        shape = tuple(None if size < 0 else size for size in self.shape)
        return TensorSpec(self.name, numpy_dtype(self.dtype), shape)


class AttentionRecord(Record):
    """How an engine's attentions are told what caches of fixed length hold.

    Attributes:
        told_by: ``order``: a prefill's tokens see those before them, and the caches are empty;
            ``lengths``: a decode step knows how many positions of each sequence are filled;
            ``mask``: it knows of each position whether it is.
        reads: What a run reads of each cache: ``new`` keys and values alone, ``filled`` positions,
            or all the ``room``.
        remark: Why it reads all the room, where that was not asked for.
    """

    told_by: Literal["order", "lengths", "mask"]
    reads: Literal["new", "filled", "room"]
    remark: str | None = None


class EngineRecord(Artifact):
    """The file beside an engine.

    Attributes:
        engine: The engine's file name.
        engine_sha256: Its hash; another file of that name is refused.
        engine_bytes: Its size.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        backend_version: Of the library that built it.
        built_on: The card and the driver's CUDA version where there was one; else empty.
        settings: What it was built with.
        precision: The float type that the graph computes in.
        plan: What was cut out of the graph, as its metadata say; empty for an uncut one.
        profiles: The shapes that it serves, by profile number.
        attention: How caches of fixed length are told; None where there are none.
        logits: Of which positions a decoder gives logits; None where there are none.
        network_layers: Layers of the parsed network.
        layers: By type, the layers that the builder made and that do real work.
        memory_bytes: By kind, what it needs: ``weights``, those of each profile counted, and
            ``activation``, its scratch memory. By the engine's own figures where it was built on
            the card, else by the builder's log.
        fixed_addresses: Whether the builder's process had them. TensorRT-RTX then gives the same
            bytes for a small graph again, as a rule; for a large one it need not.
        timing_cache_sha256: Of the timing cache that it was built with; None without one.
        parse_s: Seconds for reading the graph.
        build_s: Seconds that the builder took.
        total_s: Seconds for everything, starting the process and writing the files included.
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
    profiles: list[Profile]
    inputs: list[EngineTensor]
    outputs: list[EngineTensor]
    attention: AttentionRecord | None = None
    logits: Logits | None = None
    network_layers: int
    layers: dict[str, int]
    memory_bytes: dict[str, int]
    fixed_addresses: bool
    timing_cache_sha256: str | None = None
    parse_s: float
    build_s: float
    total_s: float

    @field_validator("settings", mode="before")
    @classmethod
    def _without_removed(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        return {name: value for name, value in settings.items() if name not in _REMOVED}

    @property
    def phases(self) -> list[Phase]:
        """What it serves, by profile number."""
        return [profile.phase for profile in self.profiles]


def sidecar_path(engine: Path) -> Path:
    """Where an engine's record stands."""
    return engine.with_name(engine.name + ".json")


def read_sidecar(engine: Path) -> EngineRecord:
    """Reads an engine's record and holds the engine against it, before anyone deserialises it.

    Raises:
        EngineError: There is no record, or it belongs to another engine.
        ArtifactError: The record is not valid.
    """
    if not engine.is_file():
        raise EngineError(f"The engine {engine} does not exist.", code="file-missing")
    path = sidecar_path(engine)
    if not path.is_file():
        raise EngineError(
            f"{engine} has no {path.name} beside it, so it is unknown what it was built for.",
            "Build it with depthcut build, and keep the two files together.",
            code="sidecar-missing",
        )
    record = EngineRecord.read(path, named=False)
    if engine.stat().st_size != record.engine_bytes:
        raise EngineError(
            f"{engine} has {engine.stat().st_size} bytes, but {path.name} is for one with "
            f"{record.engine_bytes}.",
            "It may be cut off, or the two files don't belong together: build it again.",
            code="wrong-size",
        )
    if sha256_file(engine) != record.engine_sha256:
        raise EngineError(
            f"{engine} is not the engine that {path.name} is for.",
            "Build it again.",
            code="wrong-hash",
        )
    return record


def refuse_mismatch(record: EngineRecord, version: str, devices: Sequence[Device]) -> None:
    """Refuses an engine that this machine can't load, in words.

    Raises:
        EngineError: Another version, or a card that it was not built for.
    """
    built = f"{record.engine} was built for {built_for(record)} by {record.backend} "
    here = devices[0].compute_capability if devices else "no GPU"
    if record.backend_version != version and not record.settings.version_compatible:
        raise EngineError(
            f"{built}{record.backend_version}; this is {here} with {version}.",
            "Build it again with the version that is installed here.",
            code="other-version",
        )
    targets = record.settings.compute_capabilities or _card(record)
    if targets and here not in targets:
        raise EngineError(
            f"{built}{record.backend_version}; this is {here} with {version}.",
            f"Build it with --compute-capability {here}."
            if LIBRARIES[record.backend].builds_without_gpu
            else "Build it on a card of this kind.",
            code="other-card",
        )


def other_card(record: EngineRecord, card: str) -> str:
    """A note about an engine of TensorRT that was built on a card of another name.

    Its compute capability is the same, or it would have been refused. Empty where there is nothing
    to note: TensorRT-RTX chooses its kernels on the card, and an engine may be built for more.

    Args:
        record: The engine's.
        card: The card that is to run it.
    """
    tied = record.backend == "tensorrt" and record.settings.hardware_compatibility == "none"
    built_on = record.built_on.get("gpu", card)
    if not tied or built_on == card:
        return ""
    return (
        f"{record.engine} was built on {built_on} and runs on {card}: it may be slower than one "
        "that is built here, or fail"
    )


def built_for(record: EngineRecord) -> str:
    """The cards that an engine is for, in words."""
    targets = record.settings.compute_capabilities or _card(record)
    return ", ".join(targets) or "the cards that the library supports by default"


def _card(record: EngineRecord) -> tuple[str, ...]:
    """The card that it was built on, where it is tied to it or to its compute capability."""
    tied = record.backend == "tensorrt" and record.settings.hardware_compatibility != "ampere+"
    card = record.built_on.get("compute_capability", "")
    return (card,) if tied and card else ()
