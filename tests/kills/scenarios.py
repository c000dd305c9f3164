"""Each command that writes, with the inputs that it is given, on models of a few kilobytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.command_inputs import SCORING, TIMING
from tests.kills.bench import Task

FOREIGN = {
    "out/.env.prod.old": "TOKEN=secret",
    "out/.draft.v2.part": "half a thought",
    "out/notes.txt": "mine",
    "out/.hidden/letter.txt": "mine too",
    "out/model.onnx.data.bak": "a copy",
    "out/.depthcut.txt": "about it",
}
"""What the user has in the folder of the results."""

NOTES = {"notes.txt": "mine", ".env.prod.old": "TOKEN=secret"}
INSIDE = {**NOTES, "baseline/.draft.v2.part": "half"}
"""What the user has in a folder that is a result."""


@dataclass(frozen=True)
class Scenario:
    """A command that is killed: what earlier ones added to it, what it adds, and who reads it."""

    call: str
    olds: Sequence[str]
    new: str
    readers: Mapping[str, Task]
    apart: Sequence[str] = ()
    growing: Sequence[str] = ()
    may_vary: str = "$"
    in_stages: bool = False  # each appears as it is finished where nothing was
    inside: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ("torch", "onnxruntime")

    @property
    def can_run(self) -> bool:
        """Whether all that it needs is installed."""
        return all(importlib.util.find_spec(name) is not None for name in self.needs)

    def task(self, number: int) -> Task:
        """The command itself is 0, the earlier ones are 1 and so on."""
        last = (self.new, *self.olds)[number]
        return last if last.endswith(" -q") else f"{self.call} {last} -q"


def _plan_is_whole(name: str) -> None:
    from exporter.artifacts.loaded_plan import read_replacements
    from exporter.artifacts.plans import read_plan

    read_replacements(read_plan(Path(name)), Path(name))


def _artifact(kind: str, name: str) -> None:
    from exporter import artifacts

    getattr(artifacts, kind).read(Path(name))


def _loads(name: str) -> None:
    from exporter.models.loading.model_source import load_model

    load_model(name, pruned=True)


def _engines(name: str) -> None:
    from exporter.engines.build.engine_set import read_sidecar
    from graph_passes.files.placing import finish_interrupted

    finish_interrupted(Path(name))
    for path in Path(name).glob("*.engine"):
        read_sidecar(path)


def _by(read: Callable[[str], None], *names: str) -> dict[str, Task]:
    return {name: partial(read, name) for name in names}


def _inspected(*names: str) -> dict[str, Task]:
    return {name: f"inspect {name}" for name in names}


_PLAN, _PLANNED = "plan in/importance.json -o out/plan.json", _by(_plan_is_whole, "out/plan.json")
_SEARCH = f"{_PLAN} --search greedy --config in/search.yaml"
_EXPORT = f"export in/llama -o out/res --heal none {SCORING} {TIMING}"
_REPORT: dict[str, Task] = {"out/res/report.json": "report out/res/report.json -o seen.html -q"}
_PRUNED = "prune in/whole/model.onnx -o out/model.onnx --drop attention:1 -q"
_CELLS = [f"out/res/cells/llama/{plan}-1/fp32" for plan in ("attention", "mlp")]

SCENARIOS: dict[str, Scenario] = {
    "prune": Scenario(
        "prune in/whole/model.onnx -o out/model.onnx",
        ("--drop attention:1", "--drop mlp:0,2"), "--drop attention:0 --drop mlp:1",
        _inspected("out/model.onnx"), needs=("onnxruntime",),
    ),
    "quantize": Scenario(
        "quantize in/whole -o out/model.onnx", ("--quantize int8", _PRUNED), "",
        _inspected("out/model.onnx"), needs=("onnxruntime",),
    ),
    "export": Scenario(
        _EXPORT, ("--drop-joint 2", "--drop-mlp 1 --heal bias"), "--drop-attn 1",
        {**_REPORT, **_inspected("out/res/candidate/model.onnx")}, in_stages=True, inside=INSIDE,
    ),
    "export-with-all": Scenario(
        _EXPORT, ("--drop-attn 1", "--drop-joint 2 --checkpoint --heal bias"),
        "--drop-mlp 1 --checkpoint --heal linear --quantize int8",
        {
            **_REPORT, **_inspected("out/res/candidate-quantized/model.onnx"),
            **_by(_loads, "out/res/checkpoint"),
        }, in_stages=True, inside=INSIDE,
    ),
    "heal": Scenario(
        "heal in/llama in/plan.json -o out/healed.json --check-text in/other.txt"
        f" --heal-{SCORING.removeprefix('--')}",
        ("--heal bias",), "--heal linear", _by(_plan_is_whole, "out/healed.json"),
    ),
    "checkpoint": Scenario(
        "checkpoint in/llama -o out/res", ("in/blocks.json", "in/plan.json"), "in/wide.json",
        _by(_loads, "out/res"),
    ),
    "package": Scenario(
        "package --triton out --name res --device cpu", ("in/encoder-cut",), "in/encoder",
        {"out/res": "inspect out/res/1/model.onnx/model.onnx"}, needs=("onnxruntime",),
    ),
    "compare": Scenario(
        f"compare in/whole in/cut -o out/res {TIMING}", ("--batch 2",), "",
        _REPORT, inside=NOTES, needs=("onnxruntime",),
    ),
    "sweep": Scenario(
        "sweep -o out/res", ("in/one.yaml",), "in/two.yaml",
        {
            **_by(partial(_artifact, "SweepReport"), "out/res/sweep.json"),
            **_inspected(*(f"{cell}/candidate/model.onnx" for cell in _CELLS)),
        },
        apart=(*(f"{cell}/" for cell in _CELLS), "out/res/plans/attention", "out/res/plans/mlp"),
        growing=(r"out/res/sweep\.",), in_stages=True, inside=NOTES,
    ),
    "plan": Scenario(
        _SEARCH, ("--drop-attn 1",), "--drop-joint 2", _PLANNED,
    ),
    "plan-for-a-budget": Scenario(
        f"{_PLAN} --at-most 200% --config in/budget.yaml",
        (f"{_SEARCH} --drop-attn 1 -q", "--parameters 20%"), "--parameters 10%", _PLANNED,
    ),
    "score": Scenario(
        f"score in/llama -o out/importance.json {SCORING}",
        ("--metric angular",), "--metric cosine --metric kl",
        _by(partial(_artifact, "ImportanceReport"), "out/importance.json"),
    ),
    "build": Scenario(
        "build in/tiny/model.onnx -o out/res --prompt-range 1:4:8 --context-range 1:4:8"
        " --compute-capability sm89 --config in/build.yaml",
        ("--split",), "", _by(_engines, "out/res"),
        may_vary="out/res/model-fp32-sm89", inside={"notes.txt": "mine"}, needs=("tensorrt_rtx",),
    ),
}  # fmt: skip


def names() -> tuple[str, ...]:
    """The commands that can run here."""
    return tuple(name for name, scenario in SCENARIOS.items() if scenario.can_run)
