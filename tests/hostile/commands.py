"""What is called on a stranger's folder: every command that takes one, with quick settings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.command_inputs import SCORING, TIMING

MODEL_KINDS = (
    "config entries", "config values", "config text", "index", "safetensors", "tokenizer",
    "adapter", "pickle", "code", "links", "special files", "names", "changing", "prepared output",
)  # fmt: skip
GRAPH_KINDS = (
    "config entries", "config text", "graph", "genai config", "tokenizer", "links",
    "special files", "names", "changing", "prepared output",
)  # fmt: skip
RECORD_KINDS = ("records", "links", "special files", "config text", "prepared output")
PLAN_KINDS = ("plan", *RECORD_KINDS)


@dataclass(frozen=True)
class Command:
    """A call of `depthcut`, and the stranger's folder that it is called on."""

    line: str
    folder: str
    kinds: Sequence[str] = MODEL_KINDS
    results: tuple[str, ...] = ()
    weight: float = 1
    flags: bool = False
    stages: bool = False  # keeps what is finished of it for the next call
    needs: str = "torch"
    fails: bool = False

    @property
    def name(self) -> str:
        """The command's own name."""
        return self.line.partition(" ")[0]


def _models(folders: str, line: str, result: str, weight: float, stages: bool = False) -> list[
Command]:  # fmt: skip
    return [Command(line.replace("MODEL", folder), folder, MODEL_KINDS, (result,), weight,
    flags=True, stages=stages) for folder in folders.replace("CACHE", CACHE).split()]  # fmt: skip


def _graphs(
    line: str, kinds: Sequence[str], *results: str, weight: float = 3, needs: str = "onnxruntime",
    folder: str = "onnx", stages: bool = False, fails: bool = False,
) -> Command:  # fmt: skip
    return Command(line, folder, kinds, results, weight, False, stages, needs, fails)


CACHE = "hub/models--owner--name/snapshots/0123456789abcdef0123456789abcdef01234567"
_FEW = SCORING.partition(" --samples")[2]
_SCORE, _DROP = "score MODEL -o out/importance.json", "--drop-attn 1 --no-measure"
_HEAL = f"--heal bias --check-text in/other.txt --heal-{SCORING.removeprefix('--')}"
_CHECK = "check reports/report.json --max-perplexity-increase 900% --history out/history.jsonl"

COMMANDS: list[Command] = [
    *_models("llama bert CACHE", f"{_SCORE} {SCORING}", "importance.json", 6),
    *_models("llama bert CACHE vit", f"{_SCORE} --metric depth", "importance.json", 1),
    *_models("llama bert CACHE", f"{_SCORE} --stream {SCORING}", "importance.json", 2),
    *_models("llama CACHE", "plan in/importance.json --model MODEL -o out/plan.json"
    " --search greedy --config in/search.yaml --drop-joint 1", "plan.json", 1),
    *_models("llama CACHE", f"heal MODEL in/plan.json -o out/healed.json {_HEAL}", "healed.json",
    1.5),
    *_models("llama bert CACHE", "checkpoint MODEL in/plan.json -o out/res", "res", 3),
    *_models("llama CACHE", "checkpoint MODEL in/blocks.json -o out/res --stream", "res", 2),
    *_models("llama bert CACHE", f"export MODEL -o out/res {_DROP} --time 5s {SCORING}", "res", 0.5,
    True),
    *_models("llama", f"export MODEL -o out/res {_DROP} --stream {SCORING}", "res", 0.3, True),
    *_models("vit", f"export MODEL -o out/res {_DROP} --time 5s --metric depth", "res", 0.3, True),
    *_models("llama CACHE", f"compare torch:MODEL torch:in/llama -o out/res {TIMING}", "res", 1,
    True),
    *_models("llama", "depths MODEL --importance in/importance.json -o out/depths.json -n 1"
    " --eval-text in/other.txt --eval-tokens 32 --config in/short.yaml", "depths.", 0.5),
    *_models("llama", "sweep sweeps/one.yaml -o out/res", "res", 0.5, True),
    _graphs("inspect onnx", GRAPH_KINDS, needs="onnx"),
    _graphs("inspect onnx/model.onnx --json", GRAPH_KINDS, weight=1, needs="onnx"),
    _graphs("prune onnx --drop attention:1 -o out/model.onnx", GRAPH_KINDS, "model.onnx",
    "prune.json", "genai_config.json", weight=5),
    _graphs("quantize onnx -o out/model.onnx", GRAPH_KINDS, ""),
    _graphs(f"compare onnx in/cut -o out/res {TIMING}", GRAPH_KINDS, "res", weight=2,
    stages=True),
    _graphs("package encoder --triton out --name res --device cpu", GRAPH_KINDS, "res",
    folder="encoder"),
    _graphs("generate onnx 'the list of' -n 3 --threads 1", GRAPH_KINDS),
    _graphs("generate onnx 'the list of' -n 2 --threads 1 --chat", ("template", "tokenizer")),
    Command(f"score llama -o out/importance.json --calibration chat --samples {_FEW}", "llama",
    ("template", "tokenizer"), ("importance.json",), 2),
    Command("score seen -o out/importance.json --calibration seen/pictures --samples 4", "seen",
    ("media", "media settings"), ("importance.json",), 3),
    Command("score heard -o out/importance.json --calibration heard/sounds --samples 2", "heard",
    ("media", "media settings"), ("importance.json",), 3),
    _graphs("evaluate onnx --tasks mine --task-data tasks -o out/s.json", ("task files",),
    "s.json", folder="tasks", weight=2),
    _graphs(f"{_CHECK} --junit out/j.xml -o out/c.json", ("records", "history"), "history.jsonl",
    "j.xml", "c.json", folder="reports", needs="onnx"),
    _graphs("package engine/m.engine --triton out --name res", RECORD_KINDS, "res",
    folder="engine", weight=1, needs="onnx", fails=True),
    _graphs("generate engine 'the list' -n 2 --tokenizer in/whole", RECORD_KINDS, folder="engine",
    weight=1, needs="onnx", fails=True),
    Command("checkpoint in/llama plans/plan.json -o out/res", "plans", PLAN_KINDS, ("res",), 3),
    _graphs("prune in/whole --plan plans/plan.json -o out/model.onnx", PLAN_KINDS, "model.onnx",
    "prune.json", folder="plans"),
    Command(f"heal in/llama plans/plan.json -o out/healed.json {_HEAL}", "plans", PLAN_KINDS,
    ("healed.",)),
    _graphs("plan reports/importance.json -o out/plan.json --drop-joint 1", RECORD_KINDS,
    "plan.json", folder="reports", weight=2, needs="onnx"),
    _graphs("report reports/report.json -o out/report.html", RECORD_KINDS, "report.html",
    folder="reports", weight=2, needs="onnx"),
    _graphs("report reports/report.json -o out/report.md", RECORD_KINDS, "report.md",
    folder="reports", weight=1, needs="onnx"),
    _graphs("score --compare reports/importance.json in/importance.json -o out/scores.json",
    RECORD_KINDS, "scores.", folder="reports", weight=1, needs="onnx"),
]  # fmt: skip


def chosen(rng: random.Random, commands: Sequence[Command]) -> tuple[Command, str]:
    """A command, and its line with the options that it is given beside its own."""
    command = rng.choices(commands, [item.weight for item in commands])[0]
    line = command.line
    if command.name not in ("inspect", "generate", "package", "check"):
        line += rng.choice((" -q", " -q", " -q", ""))
    if command.flags and command.name != "compare" and rng.random() < 0.12:
        line += " --trust-remote-code"
    return command, line
