"""`depthcut verify-engine`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.option_types import Count, InputPath, OnnxFile, OutputPath, Written
from exporter.options import Options, argument, dataclass, option

if TYPE_CHECKING:
    from exporter.engines.verify import PhaseResult


@dataclass(frozen=True, kw_only=True)
class VerifyEngineCall(Options):
    """What `depthcut verify-engine` is asked to do."""

    engine_file: InputPath = argument("ENGINE")
    model: OnnxFile = argument("MODEL")
    output: OutputPath | None = option(
        None,
        "Write inputs and results here, as NumPy's .npz files.",
        "-o",
        "--output",
        metavar="FOLDER",
    )
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False), Written("X")] | None = option(
        None,
        "Largest difference that passes, times a tensor's largest value.",
        usual="0.001 in float32, 0.02 in float16, 0.1 in bfloat16",
    )
    threads: Count | None = option(None, "CPU threads of ONNX Runtime.", usual="all cores")


@command(VerifyEngineCall, name="verify-engine")
def verify_engine(call: VerifyEngineCall, progress: ConsoleProgress) -> int:
    """Compare ENGINE's answers with ONNX Runtime's.

    MODEL is the ONNX file that ENGINE was built from. ENGINE may also be another ONNX file, such as
    MODEL in another form.

    Exit code 0 if all outputs agree, otherwise 1.
    """
    from exporter.engines.environment import default_threads
    from exporter.engines.verify import verify_engine as verify

    results = verify(
        call.engine_file,
        call.model,
        call.output,
        tolerance=call.tolerance,
        threads=call.threads or default_threads(),
    )
    if progress.as_json:
        echo_json(json.dumps([asdict(each) for each in results], indent=2))
    else:
        _print(results)
        if call.output is not None:
            echo("inputs and results", call.output)
    return 0 if all(result.agrees for result in results) else 1


def _print(results: list[PhaseResult]) -> None:
    rows = [
        (
            result.phase,
            result.worst.tensor,
            f"{result.worst.max_abs_error:.2e}",
            f"{result.worst.tolerance:.2e}",
            "agrees" if result.agrees else "differs",
        )
        for result in results
    ]
    print_rows(("phase", "furthest output", "difference", "tolerance", "verdict"), rows)
