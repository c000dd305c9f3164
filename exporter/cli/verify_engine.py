"""`depthcut verify-engine`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress, echo, echo_json
from exporter.cli.results import print_rows
from exporter.option_types import Count, InputPath, OnnxFile, OutputPath, Written
from exporter.options import Options, argument, dataclass, option

if TYPE_CHECKING:
    from exporter.engines.explain.narrowing import FirstDifference
    from exporter.engines.explain.verify import PhaseResult


@dataclass(frozen=True, kw_only=True)
class VerifyEngineCall(Options):
    """What `depthcut verify-engine` is asked to do."""

    engine_file: InputPath = argument("ENGINE")
    model: OnnxFile = argument("MODEL")
    output: OutputPath | None = option(
        None,
        "Write inputs, results and the smallest part that differs here, for Polygraphy.",
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
    """Compare ENGINE's answers with ONNX Runtime's, and find where they begin to differ.

    MODEL is the ONNX file that ENGINE was built from. ENGINE may also be another ONNX file, such as
    MODEL in another form. Polygraphy runs and compares both.

    Exit code 0 if all outputs agree, otherwise 1.
    """
    from exporter.engines.environment import default_threads
    from exporter.engines.explain.verify import verify_engine as verify

    results = verify(
        call.engine_file,
        call.model,
        call.output,
        tolerance=call.tolerance,
        threads=call.threads or default_threads(),
        progress=progress,
    )
    if progress.as_json:
        echo_json(json.dumps([_told(each) for each in results], indent=2))
    else:
        _print(results)
        if call.output is not None:
            echo("files for Polygraphy", call.output)
    return 1 if any(result.first for result in results) else 0


def _told(result: PhaseResult) -> dict[str, Any]:
    first = result.first
    return {
        "phase": result.phase,
        "outputs": [asdict(each) for each in result.outputs],
        "first_difference": None if first is None else _first_told(first),
    }


def _first_told(first: FirstDifference) -> dict[str, Any]:
    place = first.sublayer
    return {
        **asdict(first.difference),
        "node": first.node.name,
        "operator": first.node.op_type,
        "layer": None if place is None else place.layer,
        "kind": None if place is None else place.kind,
        "nodes": len(first.nodes),
        "only_fused": first.fused,
    }


def _print(results: list[PhaseResult]) -> None:
    rows = [
        (
            result.phase,
            result.worst.tensor,
            f"{result.worst.max_abs_error:.2e}",
            f"{result.worst.tolerance:.2e}",
            "differs" if result.first else "agrees",
        )
        for result in results
    ]
    print_rows(("phase", "furthest output", "difference", "tolerance", "verdict"), rows)
    for first in (result.first for result in results if result.first):
        echo(_sentence(first))


def _sentence(first: FirstDifference) -> str:
    place = first.sublayer
    where = "outside the layers" if place is None else f"{place.kind} of layer {place.layer}"
    told = first.difference
    if first.fused:
        return (
            f"It begins in {where}, {len(first.nodes)} nodes up to {told.tensor}: none of them "
            "differs alone, so it is their fused form."
        )
    return (
        f"It begins in {where}: {told.tensor} of node {first.node.name!r} "
        f"({first.node.op_type}) is off by {told.max_abs_error:.2e}, more than "
        f"{told.tolerance:.2e}; its inputs agree."
    )
