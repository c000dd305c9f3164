"""What is called on a stranger's folder: every command that takes one, with quick settings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.hostile.bases import SCORING, TIMING

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
    """A call of `depthcut`."""

    arguments: tuple[str, ...]
    folder: str
    kinds: Sequence[str]
    results: tuple[str, ...] = ()
    weight: float = 1
    loads: bool = False
    flags: bool = False
    stages: bool = False  # keeps what is finished of it for the next call
    needs: str = "torch"
    fails: bool = False

    @property
    def name(self) -> str:
        """The command's own name."""
        return self.arguments[0]


def _on_models(
    arguments: Sequence[str], *results: str, of: Sequence[str], **more: object
) -> list[Command]:
    return [
        Command(
            tuple(part.replace("MODEL", folder) for part in arguments), folder, MODEL_KINDS,
            results,
            loads=True, flags=True, **more,  # type: ignore[arg-type]
        )
        for folder in of
    ]  # fmt: skip


CACHE = "hub/models--owner--name/snapshots/0123456789abcdef0123456789abcdef01234567"
_TEXT = ("llama", "bert", CACHE)
_ALL = (*_TEXT, "vit")
_HEALING = ("--heal-calibration", *SCORING[1:])
_SEARCH = ("--search", "greedy", "--config", "in/search.yaml", "--drop-joint", "1")

COMMANDS: list[Command] = [
    *_on_models(("score", "MODEL", "-o", "out/importance.json", *SCORING), "importance.json",
    of=_TEXT, weight=6),
    *_on_models(("score", "MODEL", "-o", "out/importance.json", "--metric", "depth"),
    "importance.json", of=_ALL),
    *_on_models(("score", "MODEL", "-o", "out/importance.json", "--stream", *SCORING),
    "importance.json", of=_TEXT, weight=2),
    *_on_models(("plan", "in/importance.json", "--model", "MODEL", "-o", "out/plan.json", *_SEARCH),
    "plan.json", of=("llama", CACHE)),
    *_on_models(("heal", "MODEL", "in/plan.json", "-o", "out/healed.json", "--heal", "bias",
    "--check-text", "in/other.txt", *_HEALING), "healed.json", of=("llama", CACHE), weight=1.5),
    *_on_models(("checkpoint", "MODEL", "in/plan.json", "-o", "out/res"), "res", of=("llama",
    "bert", CACHE), weight=3),
    *_on_models(("checkpoint", "MODEL", "in/blocks.json", "-o", "out/res", "--stream"), "res",
    of=("llama", CACHE), weight=2),
    *_on_models(("export", "MODEL", "-o", "out/res", "--drop-attn", "1", "--no-measure", *SCORING),
    "res", of=("llama", "bert", CACHE), weight=0.5, stages=True),
    *_on_models(("export", "MODEL", "-o", "out/res", "--drop-attn", "1", "--no-measure", "--stream",
    *SCORING), "res", of=("llama",), weight=0.3, stages=True),
    *_on_models(("export", "vit", "-o", "out/res", "--drop-attn", "1", "--no-measure", "--metric",
    "depth"), "res", of=("vit",), weight=0.3, stages=True),
    *_on_models(("compare", "torch:MODEL", "torch:in/llama", "-o", "out/res", *TIMING), "res",
    of=("llama", CACHE), weight=1, stages=True),
    *_on_models(("depths", "MODEL", "--importance", "in/importance.json", "-o", "out/depths.json",
    "-n", "1", "--eval-text", "in/other.txt", "--eval-tokens", "32", "--config", "in/short.yaml"),
    "depths.", of=("llama",), weight=0.5),
    Command(("sweep", "sweeps/one.yaml", "-o", "out/res"), "llama", MODEL_KINDS, ("res",), 0.5,
    True, True, True),
    Command(("inspect", "onnx"), "onnx", GRAPH_KINDS, (), 3, needs="onnx"),
    Command(("inspect", "onnx/model.onnx", "--json"), "onnx", GRAPH_KINDS, (), 1, needs="onnx"),
    Command(("prune", "onnx", "--drop", "attention:1", "-o", "out/model.onnx"), "onnx", GRAPH_KINDS,
    ("model.onnx", "prune.json", "genai_config.json"), 5, needs="onnxruntime"),
    Command(("quantize", "onnx", "-o", "out/model.onnx"), "onnx", GRAPH_KINDS, ("",), 3,
    needs="onnxruntime"),
    Command(("compare", "onnx", "in/cut", "-o", "out/res", *TIMING), "onnx", GRAPH_KINDS, ("res",),
    2, stages=True, needs="onnxruntime"),
    Command(("package", "encoder", "--triton", "out", "--name", "res", "--device", "cpu"),
    "encoder", GRAPH_KINDS, ("res",), 3, needs="onnxruntime"),
    Command(("generate", "onnx", "the list of", "-n", "3", "--threads", "1"), "onnx", GRAPH_KINDS,
    (), 3, needs="onnxruntime"),
    Command(("generate", "onnx", "the list of", "-n", "2", "--threads", "1", "--chat"), "onnx",
    ("template", "tokenizer"), (), 3, needs="onnxruntime"),
    Command(("score", "llama", "-o", "out/importance.json", "--calibration", "chat", *SCORING[2:]),
    "llama", ("template", "tokenizer"), ("importance.json",), 2, loads=True),
    Command(("score", "seen", "-o", "out/importance.json", "--calibration", "seen/pictures",
    "--samples", "4"), "seen", ("media", "media settings"), ("importance.json",), 3, loads=True),
    Command(("score", "heard", "-o", "out/importance.json", "--calibration", "heard/sounds",
    "--samples", "2"), "heard", ("media", "media settings"), ("importance.json",), 3, loads=True),
    Command(("evaluate", "onnx", "--tasks", "mine", "--task-data", "tasks", "-o", "out/s.json"),
    "tasks", ("task files",), ("s.json",), 2, needs="onnxruntime"),
    Command(("check", "reports/report.json", "--max-perplexity-increase", "900%", "--history",
    "out/history.jsonl", "--junit", "out/j.xml", "-o", "out/c.json"), "reports", ("records",
    "history"), ("history.jsonl", "j.xml", "c.json"), 3, needs="onnx"),
    Command(("package", "engine/m.engine", "--triton", "out", "--name", "res"), "engine",
    RECORD_KINDS, ("res",), 1, needs="onnx", fails=True),
    Command(("generate", "engine", "the list", "-n", "2", "--tokenizer", "in/whole"), "engine",
    RECORD_KINDS, (), 1, needs="onnx", fails=True),
    Command(("checkpoint", "in/llama", "plans/plan.json", "-o", "out/res"), "plans", PLAN_KINDS,
    ("res",), 3),
    Command(("prune", "in/whole", "--plan", "plans/plan.json", "-o", "out/model.onnx"), "plans",
    PLAN_KINDS, ("model.onnx", "prune.json"), 3, needs="onnxruntime"),
    Command(("heal", "in/llama", "plans/plan.json", "-o", "out/healed.json", "--heal", "bias",
    "--check-text", "in/other.txt", *_HEALING), "plans", PLAN_KINDS, ("healed.",), 1),
    Command(("plan", "reports/importance.json", "-o", "out/plan.json", "--drop-joint", "1"),
    "reports", RECORD_KINDS, ("plan.json",), 2, needs="onnx"),
    Command(("report", "reports/report.json", "-o", "out/report.html"), "reports", RECORD_KINDS,
    ("report.html",), 2, needs="onnx"),
    Command(("report", "reports/report.json", "-o", "out/report.md"), "reports",
    RECORD_KINDS, ("report.md",), 1, needs="onnx"),
    Command(("check", "reports/report.json", "--max-perplexity-increase", "900%", "--history",
    "out/history.jsonl"), "reports", RECORD_KINDS, ("history.jsonl",), 1, needs="onnx"),
    Command(("score", "--compare", "reports/importance.json", "in/importance.json", "-o",
    "out/scores.json"), "reports", RECORD_KINDS, ("scores.",), 1, needs="onnx"),
]  # fmt: skip


def chosen(rng: random.Random, commands: Sequence[Command]) -> tuple[Command, list[str]]:
    """A command, and the options that it is given beside its own."""
    command = rng.choices(commands, [item.weight for item in commands])[0]
    options = []
    if command.name not in ("inspect", "generate", "package", "check"):
        options += rng.choice((["-q"], ["-q"], ["-q"], []))
    if command.flags and command.name != "compare" and rng.random() < 0.12:
        options.append("--trust-remote-code")
    return command, options
