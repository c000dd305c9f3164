"""`depthcut build` and `package`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.results import print_result
from exporter.engines.build.engine_set import EngineRecord, built_for, holds_engines_alone
from exporter.engines.build.libraries import ask_driver, usual_backend
from exporter.engines.build.profiles import SHAPES, Ranges
from exporter.engines.build.settings import ENGINES, BuildSettings, EngineOption
from exporter.engines.packaging import MAX_BATCH
from exporter.models.model_folder import find_model
from exporter.option_types import Count, InputPath, Names, OnnxFile, OutputPath, Written
from exporter.options import Options, argument, dataclass, option, part, required

_Phases = Annotated[Names, Written("PHASE,PHASE", True)]


@dataclass(frozen=True, kw_only=True)
class BuildCall(Options):
    """What `depthcut build` is asked to do."""

    model: OnnxFile = argument("MODEL")
    output: OutputPath = required(
        "The engine's file, or a folder, in which depthcut chooses the name.", "-o", "--output"
    )
    library: EngineOption = part(EngineOption())
    builds: Count = option(
        1,
        "Build each engine N times (-b1, -b2, ...), since builds may differ in speed.",
        section=ENGINES,
    )
    phases: _Phases = option(
        (),
        "prefill, decode, encode.",
        "--profile",
        usual="prefill,decode with a cache, else encode",
        section=SHAPES,
    )
    split: bool | None = option(
        None,
        "Build one engine for each profile, or one for all.",
        "--split/--no-split",
        usual="one for each, where caches have a fixed length",
        section=SHAPES,
    )
    ranges: Ranges = part(Ranges())
    settings: BuildSettings = part(BuildSettings())


@command(BuildCall)
def build(call: BuildCall, progress: ConsoleProgress) -> None:
    """Build an engine from MODEL, an ONNX file or a folder with one, with a record next to it."""
    from exporter import build_engines
    from exporter.engines.build.engine_set import EngineSet
    from exporter.engines.decoding.verify import believed

    built = build_engines(
        call.model,
        call.output,
        phases=call.phases or None,
        split=call.split,
        builds=call.builds,
        ranges=call.ranges,
        backend=usual_backend(call.library.engine, call.settings.compute_capabilities),
        settings=call.settings,
        progress=progress,
    )
    pairs: list[tuple[Path, EngineRecord]] = []
    for number in range(call.builds):
        ends = zip(*built[number :: call.builds], strict=True)
        engines = believed(EngineSet(*ends), call.model, progress)
        pairs += zip(engines.paths, engines.records, strict=True)
    records = [record for _, record in pairs]
    lines = [line for path, record in pairs for line in (_line(record), path)]
    print_result(records if len(records) > 1 else records[0], progress.as_json, *lines)


def _line(record: EngineRecord) -> str:
    phases = " and ".join(entry.phase for entry in record.profiles)
    problem = ask_driver().problem
    check = "not checked" if record.check is None else f"off by {record.check.error:.2g}"
    return (
        f"{phases}: {record.engine_bytes / 1e6:.1f} MB, {sum(record.layers.values())} layers from "
        f"{record.network_layers}, in {record.total_s:.1f} s, for {built_for(record)}"
        + (f"; built, not run: {problem}" if problem else f"; {check} against ONNX Runtime")
    )


@dataclass(frozen=True, kw_only=True)
class PackageCall(Options):
    """What `depthcut package` is asked to do."""

    model: InputPath = argument("MODEL")
    triton: OutputPath = required("The Triton model repository.", metavar="REPOSITORY")
    name: str | None = option(None, "The model's name.", metavar="NAME", usual="its folder's")
    device: Literal["gpu", "cpu"] = option("gpu", "Where an ONNX file runs; an engine needs a GPU.")
    instances: Count = option(1, "Number of instances.", config_only=True)
    max_batch: Count = option(
        MAX_BATCH,
        "The largest batch that Triton makes of requests to an ONNX file; an engine's is built in.",
        config_only=True,
    )


@command(PackageCall)
def package(call: PackageCall, progress: ConsoleProgress) -> None:
    """Pack MODEL for serving.

    Triton takes an encoder, or another model without a KV cache: an ONNX file, a folder with
    model.onnx, or an engine of TensorRT.
    """
    from exporter.engines.packaging import package_triton

    keep = call.model.is_file() or holds_engines_alone(call.model)
    source = call.model if keep else find_model(call.model).onnx
    place = package_triton(
        source,
        call.triton,
        name=call.name,
        device=call.device,
        instances=call.instances,
        max_batch=call.max_batch,
        progress=progress,
    )
    print_result({"path": place}, progress.as_json, place)
