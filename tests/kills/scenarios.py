"""Each command that writes, with the inputs that it is given, on models of a few kilobytes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.kills.bench import Task

Arguments = tuple[str, ...]

FOREIGN = {
    "out/.env.prod.old": "TOKEN=secret",
    "out/.draft.v2.part": "half a thought",
    "out/notes.txt": "mine",
    "out/.hidden/letter.txt": "mine too",
    "out/model.onnx.data.bak": "a copy",
    "out/.depthcut.txt": "about it",
}
"""What the user has in the folder of the results."""

INSIDE = {"notes.txt": "mine", ".env.prod.old": "TOKEN=secret", "baseline/.draft.v2.part": "half"}
"""What the user has in a folder that is a result."""


@dataclass(frozen=True)
class Scenario:
    """A command that is killed."""

    olds: Sequence[Arguments]
    new: Task
    readers: Mapping[str, Task] = field(default_factory=dict)
    apart: Sequence[str] = ()
    growing: Sequence[str] = ()
    may_vary: str = "$"
    inside: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ("torch", "onnxruntime")

    @property
    def can_run(self) -> bool:
        """Whether all that it needs is installed."""
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


SCORING = ("--calibration", "in/text.txt", "--samples", "2", "--sequence-length", "16")
_TIMING = (
    *("--prefill", "8", "--decode-past", "8", "--rounds", "2", "--threads", "1"),
    *("--eval-text", "in/other.txt", "--eval-tokens", "32", "--config", "in/short.yaml"),
)
_HEAL = ("--heal-calibration", *SCORING[1:], "--check-text", "in/other.txt")
_SEARCH = ("--search", "greedy", "--config", "in/search.yaml")


def _plan_is_whole(name: str) -> Callable[[], object]:
    def read() -> None:
        from exporter.artifacts.loaded_plan import read_replacements
        from exporter.artifacts.plans import read_plan

        read_replacements(read_plan(Path(name)), Path(name))

    return read


def _artifact(kind: str, name: str) -> Callable[[], object]:
    def read() -> None:
        from exporter import artifacts

        getattr(artifacts, kind).read(Path(name))

    return read


def _loads(name: str) -> Callable[[], object]:
    def read() -> None:
        from exporter.models.loading.model_source import load_model

        load_model(name, pruned=True)

    return read


def _engines(name: str) -> Callable[[], object]:
    def read() -> None:
        from exporter.engines.build.engine_set import read_sidecar
        from graph_passes.files.placing import finish_interrupted

        finish_interrupted(Path(name))
        for path in Path(name).glob("*.engine"):
            read_sidecar(path)

    return read


def _export(*drops: str) -> Arguments:
    return (
        "export",
        "in/llama",
        "-o",
        "out/res",
        "--heal",
        "none",
        *drops,
        *SCORING,
        *_TIMING,
        "-q",
    )


def _quantize(*options: str) -> Arguments:
    return ("quantize", "in/whole", "-o", "out/model.onnx", *options, "-q")


def _prune(*drops: str) -> Arguments:
    return ("prune", "in/whole/model.onnx", "-o", "out/model.onnx", *drops, "-q")


def _checkpoint(plan: str) -> Arguments:
    return ("checkpoint", "in/llama", f"in/{plan}.json", "-o", "out/res", "-q")


def _compare(*options: str) -> Arguments:
    return ("compare", "in/whole", "in/cut", "-o", "out/res", *_TIMING, *options, "-q")


def _heal(*options: str) -> Arguments:
    return ("heal", "in/llama", "in/plan.json", "-o", "out/healed.json", *_HEAL, *options, "-q")


def _plan(*options: str) -> Arguments:
    return ("plan", "in/importance.json", "-o", "out/plan.json", *_SEARCH, *options, "-q")


def _budget(share: str) -> Arguments:
    given = ("plan", "in/importance.json", "-o", "out/plan.json", "--parameters", share)
    return (*given, "--at-most", "200%", "--config", "in/budget.yaml", "-q")


def _score(*options: str) -> Arguments:
    return ("score", "in/llama", "-o", "out/importance.json", *SCORING, *options, "-q")


def _triton(source: str) -> Arguments:
    return ("package", source, "--triton", "out", "--name", "res", "--device", "cpu")


def _sweep(file: str) -> Arguments:
    return ("sweep", f"in/{file}.yaml", "-o", "out/res", "-q")


def _build(*options: str) -> Arguments:
    return (
        *(
            "build",
            "in/tiny.onnx",
            "-o",
            "out/res",
            "--prompt-range",
            "1:4:8",
            "--context-range",
            "1:4:8",
        ),
        *("--compute-capability", "sm89", "--config", "in/build.yaml", *options, "-q"),
    )


_CELLS, _CUT = "out/res/cells/llama", "fp32/candidate/model.onnx"
_PAGE = ("-o", "seen.html", "-q")

SCENARIOS: dict[str, Scenario] = {
    "prune": Scenario(
        (_prune("--drop", "attention:1"), _prune("--drop", "mlp:0,2")),
        _prune("--drop", "attention:0", "--drop", "mlp:1"),
        {"out/model.onnx": ("inspect", "out/model.onnx")},
        needs=("onnxruntime",),
    ),
    "quantize": Scenario(
        (_quantize("--quantize", "int8"), _prune("--drop", "attention:1")),
        _quantize(),
        {"out/model.onnx": ("inspect", "out/model.onnx")},
        needs=("onnxruntime",),
    ),
    "export": Scenario(
        (_export("--drop-joint", "2"), _export("--drop-mlp", "1", "--heal", "bias")),
        _export("--drop-attn", "1"),
        {
            "out/res/report.json": ("report", "out/res/report.json", *_PAGE),
            "out/res/candidate/model.onnx": ("inspect", "out/res/candidate/model.onnx"),
        },
        inside=INSIDE,
    ),
    "export-with-all": Scenario(
        (
            _export("--drop-attn", "1"),
            _export("--drop-joint", "2", "--checkpoint", "--heal", "bias"),
        ),
        _export("--drop-mlp", "1", "--checkpoint", "--heal", "linear", "--quantize", "int8"),
        {
            "out/res/report.json": ("report", "out/res/report.json", *_PAGE),
            "out/res/candidate-quantized/model.onnx": (
                *("inspect", "out/res/candidate-quantized/model.onnx"),
            ),
            "out/res/candidate/hf": _loads("out/res/candidate/hf"),
        },
        inside=INSIDE,
    ),
    "heal": Scenario(
        (_heal("--heal", "bias"),),
        _heal("--save-checkpoint", "out/res"),
        {"out/healed.json": _plan_is_whole("out/healed.json"), "out/res": _loads("out/res")},
        apart=("out/res/",),
    ),
    "checkpoint": Scenario(
        (_checkpoint("blocks"), _checkpoint("plan")),
        _checkpoint("wide"),
        {"out/res": _loads("out/res")},
    ),
    "package": Scenario(
        (_triton("in/encoder-cut"),),
        _triton("in/encoder"),
        {"out/res": ("inspect", "out/res/1/model.onnx/model.onnx")},
        needs=("onnxruntime",),
    ),
    "compare": Scenario(
        (_compare("--batch", "2"),),
        _compare(),
        {"out/res/report.json": ("report", "out/res/report.json", *_PAGE)},
        inside={name: text for name, text in INSIDE.items() if "/" not in name},
        needs=("onnxruntime",),
    ),
    "sweep": Scenario(
        (_sweep("one"),),
        _sweep("two"),
        {
            "out/res/sweep.json": _artifact("SweepReport", "out/res/sweep.json"),
            f"{_CELLS}/attention-1/{_CUT}": ("inspect", f"{_CELLS}/attention-1/{_CUT}"),
            f"{_CELLS}/mlp-1/{_CUT}": ("inspect", f"{_CELLS}/mlp-1/{_CUT}"),
        },
        apart=(
            *(rf"{_CELLS}/{plan}-1/fp32/" for plan in ("attention", "mlp")),
            *(rf"out/res/plans/{plan}" for plan in ("attention", "mlp")),
        ),
        growing=(r"out/res/sweep\.",),
        inside={"notes.txt": "mine", ".env.prod.old": "TOKEN=secret"},
    ),
    "plan": Scenario(
        (_plan("--drop-attn", "1"),),
        _plan("--drop-joint", "2"),
        {"out/plan.json": _plan_is_whole("out/plan.json")},
    ),
    "plan-for-a-budget": Scenario(
        (_plan("--drop-attn", "1"), _budget("20%")),
        _budget("10%"),
        {"out/plan.json": _plan_is_whole("out/plan.json")},
    ),
    "score": Scenario(
        (_score("--metric", "angular"),),
        _score("--metric", "cosine", "--metric", "kl"),
        {"out/importance.json": _artifact("ImportanceReport", "out/importance.json")},
    ),
    "build": Scenario(
        (_build("--split"),),
        _build(),
        {"out/res": _engines("out/res")},
        may_vary="out/res/tiny-fp32-sm89",
        inside={"notes.txt": "mine"},
        needs=("tensorrt_rtx",),
    ),
}


@functools.cache
def names() -> tuple[str, ...]:
    """The commands that can run here."""
    return tuple(name for name, scenario in SCENARIOS.items() if scenario.can_run)
