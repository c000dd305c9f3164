"""From click's options to the library's own option classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.cli.budget_options import (
    IDLE,
    asked_heal,
    asks_for_budget,
    budget_request,
    refuse_idle,
)
from exporter.cli.engine_options import capabilities
from exporter.cli.heal_options import heal_request
from exporter.cli.options import AUTO
from exporter.cli.quantize_options import QUANTIZE_OPTIONS, quantize_settings
from exporter.cli.search_options import search_request
from exporter.cli.stream_options import streams
from exporter.compare import CompareOptions, QualityOptions, TimingOptions
from exporter.engines.build.settings import BuildSettings
from exporter.errors import UsageError
from exporter.heal.options import HealOptions
from exporter.models.loading.options import SourceOptions
from exporter.pipeline.request import (
    DropRequest,
    EngineRequest,
    ExportRequest,
)
from exporter.quantize.settings import QuantizeSettings
from exporter.score import ScoreOptions


def export_request(
    model: str, output: Path, force: bool, options: Mapping[str, Any]
) -> ExportRequest:
    """All of `depthcut export`'s options."""
    return ExportRequest(
        source=model,
        out=output,
        drops=asked_drops(options),
        search=search_request(options),
        exporter=options["exporter"],
        target=options["target"],
        opset=options["opset"],
        cache_length=options["cache_length"],
        load=source_options(options),
        score=score_options(options),
        compare=compare_options(options),
        quantize=quantize_request(model, options),
        engines=engine_request(options),
        heal=_healing(options),
        checkpoint=options["checkpoint"],
        stream=streams(options),
        stream_dir=options["stream_dir"],
        compared=options["compared"],
        force=force,
    )


def _healing(options: Mapping[str, Any]) -> HealOptions | None:
    """How the plan is healed on the way, by default on the text that importance is measured on.

    Raises:
        UsageError: Something is said of a healing that nobody asked for.
    """
    own, scored = options["heal_calibration"], options["calibration"]
    kind = asked_heal(options)
    if own and kind is None:
        raise UsageError("--heal-calibration is for healing.", "Say what to put in with --heal.")
    texts = own or (() if scored is None else (scored,))
    return heal_request(kind, options, calibration=texts, prefix="heal_")


def quantize_request(model: str, options: Mapping[str, Any]) -> QuantizeSettings | None:
    """How both models are quantised on the way, if at all.

    The text that importance is measured on is what a method looks at that needs one; text that the
    model samples itself can't be. A model that is a GGUF file is itself the one whose blocks are
    kept.

    Raises:
        UsageError: Something is said of a quantisation that nobody asked for.
    """
    scheme = options["quantize"]
    if scheme is None:
        for name in QUANTIZE_OPTIONS:
            if options[name] is not None:
                words = name.removeprefix("quantize_").replace("_", "-")
                option = words if name == "modelopt_python" else f"quantize-{words}"
                raise UsageError(
                    f"--{option} is for quantisation.", "Say into what with --quantize."
                )
        return None
    text = options["calibration"]
    if options["quantize_method"] == "gguf" and model.endswith(".gguf"):
        options = {**options, "quantize_gguf": options["quantize_gguf"] or Path(model)}
    return quantize_settings(scheme, options, calibration=None if text == "self" else text)


def engine_request(options: Mapping[str, Any]) -> EngineRequest | None:
    """The engines to build on the way, if any.

    Raises:
        UsageError: Something is said of engines that nobody asked for.
    """
    if options["engine"] is None:
        for name in ("--compute-capability", "--optimization-level"):
            key = "compute_capabilities" if "capability" in name else "optimization_level"
            if options[key] is not None:
                raise UsageError(f"{name} is for engines.", "Say which with --engine.")
        if options["builds"] != 1:
            raise UsageError("--builds is for engines.", "Say which with --engine.")
        if options["split"]:
            raise UsageError("--split is for engines.", "Say which with --engine.")
        return None
    settings = BuildSettings(
        compute_capabilities=capabilities(options["compute_capabilities"]),
        optimization_level=options["optimization_level"],
    )
    return EngineRequest(options["engine"], options["builds"], settings, options["split"])


def asked_drops(options: Mapping[str, Any]) -> DropRequest:
    """What to drop; exactly one way of saying it.

    Raises:
        UsageError: Something is said of a budget that nobody asked for.
    """
    counted = any(options[name] for name in ("attention", "mlp", "block", "joint"))
    search = options["search"]
    if not asks_for_budget(options) and search not in ("greedy", "evolution"):
        refuse_idle(options, IDLE)
    asked = counted or asks_for_budget(options)
    return DropRequest(budget_request(options) if asked else None, options["plan"])


def source_options(options: Mapping[str, Any]) -> SourceOptions:
    """How the PyTorch model may be loaded."""
    return SourceOptions(
        dtype=options.get("dtype", "float32"),
        revision=options["revision"],
        trust_remote_code=options["trust_remote_code"],
        allow_pickle=options["allow_pickle"],
        allow_any_model_type=options["allow_any_model_type"],
    )


def score_options(options: Mapping[str, Any]) -> ScoreOptions:
    """By what and on which text importance is measured."""
    names = (
        *("metrics", "calibration", "samples", "sequence_length", "batch_size", "seed"),
        *("kl_positions", "blocks"),
    )
    return ScoreOptions(**{name: options[name] for name in names})


def compare_options(options: Mapping[str, Any]) -> CompareOptions:
    """How two models are measured."""
    return CompareOptions(
        provider=options["provider"],
        threads=None if options["threads"] == AUTO else options["threads"],
        prefill_lengths=options["prefill"],
        decode_past_lengths=options["decode_past"],
        batches=options["batch"],
        rounds=options["rounds"],
        eval_text=options["eval_text"],
        eval_tokens=options["eval_tokens"],
        quality=quality_options(options),
        timing=TimingOptions(
            time_budget_s=options["time_budget"],
            threshold=options["threshold"],
            generate=options["generate"],
            reload=not options["load_once"],
        ),
    )


def quality_options(options: Mapping[str, Any]) -> QualityOptions:
    """What is measured of the answers; a command without these options has the defaults."""
    names = (
        *("stride", "tasks", "task_data", "task_limit"),
        *("agreement_prompts", "agreement_tokens", "long_context"),
    )
    return QualityOptions(**{name: options[name] for name in names if name in options})
