"""`depthcut export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from exporter.artifacts import PruningPlan
from exporter.choose.budgets.budget import (
    USUAL_LIMITS,
    USUAL_REQUEST,
    asks_for_more_than_numbers,
)
from exporter.choose.selection.search_options import DROPPING
from exporter.cli.command import command
from exporter.cli.console import ConsoleProgress
from exporter.cli.required_speedup import RequiredSpeedup, exit_code
from exporter.cli.results import print_comparison, print_models
from exporter.errors import OptionError
from exporter.options import Options, dataclass, only_with, option, part
from exporter.pipeline.request import QUICK, ExportRequest

_FASTEST_DTYPES = {"cpu": "float32", "cuda": "float16"}
"""What the fastest form is written in for each provider."""
_ROW_S = 20.0
"""For a measured row where nothing is said at all: an answer within a quarter of an hour."""
_CHANGING = (None, "auto", "fold", "distill")
"""Ways of healing that change kept weights, the usual one among them."""
_WEIGHTS = (*_CHANGING, "none")
"""Ways that put nothing in the branches' places, and none."""


@dataclass(frozen=True, kw_only=True)
class ExportCall(Options):
    """What `depthcut export` is asked to do."""

    request: ExportRequest = part()
    allow_damage: bool = option(
        False,
        "Go on even if the perplexity more than doubles; for encoders, if the mean cosine of the "
        "embeddings falls below 0.8; for classifiers, if fewer than 0.8 of the texts keep their "
        "class.",
        brief="Go on even if the model becomes useless",
        section=DROPPING,
    )
    quick: bool = option(
        False,
        "A first look: fewer tokens, no training, shorter measurements.",
        brief="A first look: less text, no training",
    )
    required: RequiredSpeedup = part(RequiredSpeedup(), rare=("require_speedup",))
    rules = (only_with("required.require_speedup", "request.drops.budget.target_speedup"),)

    @classmethod
    def settle(cls, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without a number, a goal or a plan the largest cut is taken that costs next to nothing.

        A cut is healed as the machine can afford; the paper's own way is not, nor is a model that
        is read a layer at a time.
        """
        _refuse_quick_training(told)
        if told.get("plan") is not None or told.get("stream"):
            return told
        told = {**QUICK, **told} if told.get("quick") else told
        if not _names_goal(told):
            usual = {} if asks_for_more_than_numbers(told) else USUAL_LIMITS
            told = {**_fastest_form(told), "time_budget": _ROW_S, **told, **usual}
        if not _names_goal(told) and told.get("heal") in _CHANGING:
            told = {**_usual_request(told), **told}
        if told.get("search") == "one-shot":
            return told
        by_itself = "auto" if told.get("heal") in _WEIGHTS else None
        if told.get("heal") is None and told.get("quick"):
            # Where a model has no weight that can be folded into, as BERT, maps take the places.
            return {"search": by_itself, "replacements": "linear", **told, "heal": "fold"}
        return {"search": by_itself, **told, "heal": told.get("heal") or "auto"}


def _refuse_quick_training(told: Mapping[str, Any]) -> None:
    if told.get("quick") and told.get("time") is not None and told.get("heal") is None:
        raise OptionError(
            "--quick trains nothing, so there is no training for --time to limit.",
            "Leave --quick out for a training of that length, or --time for a first look.",
            ["quick", "time"],
        )


def _names_goal(told: Mapping[str, Any]) -> bool:
    """Whether more is asked for than the largest cut within limits on quality."""
    counts = tuple(f"drop_{kind}" for kind in ("attn", "cross", "mlp", "block", "joint"))
    others = ("keep_first", "parameters", "fits", "faster")
    return any(told.get(name) is not None for name in (*counts, *others))


def _usual_request(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """Whose time the largest cut saves; TensorRT's graphs are not timed on ONNX Runtime."""
    return {} if str(told.get("target")).startswith("tensorrt") else {"at": USUAL_REQUEST}


def _fastest_form(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """The target that this machine runs fastest, where its exporter is installed."""
    others = any(told.get(key) for key in ("exporter", "opset", "engine", "modelopt_python"))
    provider, dtype = told.get("provider") or "cpu", told.get("dtype") or "float32"
    if others or dtype != _FASTEST_DTYPES.get(provider):
        return {}
    if find_spec("onnxruntime_genai") is None:
        return {}
    return {"target": f"onnxruntime-{provider}"}


def _check(call: ExportCall) -> None:
    from exporter.pipeline.refusals import refuse_contradictions

    refuse_contradictions(call.request)


@command(ExportCall, check=_check)
def export(call: ExportCall, progress: ConsoleProgress) -> int:
    """Score MODEL, drop its most redundant sublayers, export and compare both.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. Without a number, a goal or a plan, the
    largest cut is taken that costs at most 2 % perplexity after healing (encoders: 0.98 mean cosine
    of the embeddings). The output folder holds the plan, both models and the report. Valid stages
    of an earlier run are reused.
    """
    from exporter.pipeline.road import export_model, write_models

    request = replace(call.request, refuses_useless=not call.allow_damage, quick=call.quick)
    if request.compared:
        print_comparison(export_model(request, progress), request.out, progress.as_json)
    else:
        print_models(write_models(request, progress), request.out, progress.as_json)
    if not call.required.require_speedup:
        return 0
    return exit_code(PruningPlan.read(request.out / "plan.json"))
