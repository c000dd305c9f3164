"""`depthcut refit`."""

from __future__ import annotations

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo
from exporter.option_types import InputFile, OnnxFile, OutputPath
from exporter.options import Options, argument, dataclass, required


@dataclass(frozen=True, kw_only=True)
class RefitCall(Options):
    """What `depthcut refit` is asked to do."""

    engine_file: InputFile = argument("ENGINE")
    model: OnnxFile = argument("MODEL")
    output: OutputPath = required("The new engine's file.", "-o", "--output")


@command(RefitCall, json=False)
def refit(call: RefitCall, progress: ConsoleProgress) -> None:
    """Write ENGINE with the weights of MODEL, an ONNX file or a folder with one.

    ENGINE was built with --refittable or --strip-weights. Needs a GPU.
    """
    from exporter.engines.build.refit import refit_engine

    path, record = refit_engine(call.engine_file, call.model, call.output, progress=progress)
    echo(f"{record.engine_bytes / 1e6:.1f} MB with the weights of {call.model}", path)
