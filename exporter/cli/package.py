"""`depthcut package`."""

from __future__ import annotations

from typing import Literal

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo
from exporter.engines.build.engine_set import holds_engines_alone
from exporter.engines.packaging import MAX_BATCH
from exporter.models.model_folder import find_model
from exporter.option_types import Count, InputPath, OutputPath
from exporter.options import Options, argument, dataclass, option, required


@dataclass(frozen=True, kw_only=True)
class PackageCall(Options):
    """What `depthcut package` is asked to do."""

    model: InputPath = argument("MODEL")
    triton: OutputPath = required("The Triton model repository.", metavar="REPOSITORY")
    name: str | None = option(None, "The model's name.", metavar="NAME", usual="its folder's")
    device: Literal["gpu", "cpu"] = option("gpu", "Where it runs.")
    instances: Count = option(1, "Number of instances.", config_only=True)
    max_batch: Count = option(
        MAX_BATCH,
        "The largest batch that Triton makes of requests to an ONNX file; an engine's is built in.",
    )


@command(PackageCall, json=False)
def package(call: PackageCall, _progress: ConsoleProgress) -> None:
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
    )
    echo(place)
