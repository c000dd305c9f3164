"""From click's options to the library's own option classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.compare import CompareOptions, QualityOptions
from exporter.request import (
    DropRequest,
    ExportRequest,
    ScoreOptions,
    SourceOptions,
)


def export_request(
    model: str, output: Path, force: bool, options: Mapping[str, Any]
) -> ExportRequest:
    """All of `depthcut export`'s options."""
    return ExportRequest(
        source=model,
        out=output,
        drops=drop_request(options),
        exporter=options["exporter"],
        opset=options["opset"],
        load=source_options(options),
        score=score_options(options),
        compare=compare_options(options),
        force=force,
    )


def drop_request(options: Mapping[str, Any]) -> DropRequest:
    """What to drop; exactly one way of saying it."""
    counts = {name: options[name] or 0 for name in ("attention", "mlp", "block", "joint")}
    return DropRequest(**counts, plan=options.get("plan"))


def source_options(options: Mapping[str, Any]) -> SourceOptions:
    """How the PyTorch model may be loaded."""
    return SourceOptions(
        dtype=options.get("dtype", "float32"),
        revision=options["revision"],
        trust_remote_code=options["trust_remote_code"],
        allow_pickle=options["allow_pickle"],
    )


def score_options(options: Mapping[str, Any]) -> ScoreOptions:
    """On which text importance is measured."""
    names = ("calibration", "samples", "sequence_length", "batch_size", "seed")
    return ScoreOptions(**{name: options[name] for name in names})


def compare_options(options: Mapping[str, Any]) -> CompareOptions:
    """How two models are measured."""
    rounds = {} if options["rounds"] is None else {"rounds": options["rounds"]}
    return CompareOptions(
        provider=options["provider"],
        threads=options["threads"],
        prefill_lengths=options["prefill"],
        decode_past_lengths=options["decode_past"],
        batch=options["batch"],
        eval_text=options["eval_text"],
        eval_tokens=options["eval_tokens"],
        quality=quality_options(options),
        **rounds,
    )


def quality_options(options: Mapping[str, Any]) -> QualityOptions:
    """What is measured of the answers; a command without these options has the defaults."""
    names = ("stride", "tasks", "task_data", "task_limit")
    return QualityOptions(**{name: options[name] for name in names if name in options})
