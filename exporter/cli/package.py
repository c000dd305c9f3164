"""`depthcut package`."""

from __future__ import annotations

from typing import Literal

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo
from exporter.engines.build.engine_set import holds_engines_alone
from exporter.engines.packaging import MAX_BATCH, package_tarball
from exporter.models.model_folder import find_model
from exporter.option_types import Count, InputFolder, InputPath, OutputPath
from exporter.options import Options, Rule, argument, dataclass, only_with, option


@dataclass(frozen=True, kw_only=True)
class PackageCall(Options):
    """What `depthcut package` is asked to do."""

    model: InputPath = argument("MODEL")
    triton: OutputPath | None = option(
        None, "Pack into a Triton model repository.", metavar="REPOSITORY"
    )
    tarball: OutputPath | None = option(
        None, "Pack into one .tar.gz with everything that the model needs.", metavar="FILE"
    )
    beside: InputFolder | None = option(
        None,
        "For --tarball: the folder with tokenizer, config and plan.",
        usual="the engine's",
    )
    name: str | None = option(
        None, "For --triton: the model's name.", metavar="NAME", usual="its folder's"
    )
    device: Literal["gpu", "cpu"] = option("gpu", "For --triton: where it runs.")
    instances: Count = option(1, "For --triton: number of instances.", config_only=True)
    max_batch: Count = option(
        MAX_BATCH,
        "For --triton: the largest batch that Triton makes of requests to an ONNX file; an "
        "engine's is built in.",
    )
    rules = (
        Rule(
            ("triton", "tarball"),
            lambda told: told.triton is None and told.tarball is None,
            "Say where to: {0} REPOSITORY or {1} FILE, or both.",
        ),
        only_with("beside", "tarball"),
        *(only_with(name, "triton") for name in ("name", "device", "instances", "max_batch")),
    )


@command(PackageCall, json=False)
def package(call: PackageCall, _progress: ConsoleProgress) -> None:
    """Pack MODEL for serving.

    Triton takes an encoder, or another model without a KV cache: an ONNX file, a folder with
    model.onnx, or an engine of TensorRT. The archive takes an engine with the record next to it, or
    a folder with an engine for each phase.
    """
    from exporter.engines.packaging import package_triton

    keep = call.model.is_file() or holds_engines_alone(call.model)
    source = call.model if keep else find_model(call.model).onnx
    if call.tarball is not None:
        names = package_tarball(source, call.tarball, beside=call.beside)
        echo(f"{len(names)} files", call.tarball)
    if call.triton is not None:
        echo(
            package_triton(
                source,
                call.triton,
                name=call.name,
                device=call.device,
                instances=call.instances,
                max_batch=call.max_batch,
            )
        )
