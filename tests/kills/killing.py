"""One kill: a state to begin from, a moment, and what must hold afterwards."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kills.bench import Bench, Ended
from tests.kills.scenarios import FOREIGN, SCENARIOS, SCORING, Scenario
from tests.kills.ticks import Kill
from tests.kills.trees import (
    Result,
    Tree,
    broken_promises,
    pairs,
    parents,
    same_json,
    shown,
    tree,
)

_LATE, _TIMED, _GROUP, _AGAIN = 0.5, 0.2, 0.6, 0.3
_TRIES = 6
_RUNS = 2
_READING_OPERATIONS = 14


@dataclass(frozen=True)
class Beginning:
    """A state that a command is called in, and what it does when nobody kills it."""

    template: Path
    start: Tree
    result: Result
    run: Ended


@dataclass
class Outcome:
    """What came of one kill, or of several in a row."""

    command: str
    seed: int
    kills: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    def blame(self, kind: str, told: Iterable[str]) -> None:
        """Notes what is wrong."""
        self.problems += [(kind, text) for text in told]


class Killing:
    """Kills commands in one bench."""

    def __init__(
        self, root: Path, commands: Sequence[str], *, most_beginnings: int | None = None
    ) -> None:
        self.bench = Bench(root / "bench")
        self._root = root
        self._most = most_beginnings
        self._beginnings: dict[tuple[str, int], Beginning] = {}
        if any("torch" in SCENARIOS[name].needs for name in commands):
            once_exported(root / "exports")
        made = self.bench.run(lambda: write_inputs(self.bench.work / "in", commands))
        assert made.code == 0, made.said
        (self.bench.work / "out").mkdir()
        _write(self.bench.work, FOREIGN)
        self._inputs = tree(self.bench.work / "in")
        shutil.copytree(self.bench.work, root / "inputs", symlinks=True)

    def kill(self, command: str, seed: int) -> Outcome:
        """Kills a command, looks what it left, and runs it again."""
        rng = random.Random(f"{command}:{seed}")
        scenario, outcome = SCENARIOS[command], Outcome(command, seed)
        numbers = [1, 0, *range(2, 1 + len(scenario.olds))]
        beginning = self.beginning(command, rng.choice(numbers[: self._most]))
        check = self.check(command, beginning, outcome)
        self.bench.reset(beginning.template)
        if not self._killed(scenario, beginning, rng, outcome):
            outcome.story.append("it had ended each time")
            return outcome
        check.as_a_stranger_reads()
        if rng.random() < _AGAIN:
            self._disturb(scenario, beginning, rng, outcome)
            check.as_a_stranger_reads()
        self._read(scenario, check)
        check.whole()
        self.again(command, beginning, outcome)
        return outcome

    def _killed(
        self, scenario: Scenario, beginning: Beginning, rng: random.Random, outcome: Outcome
    ) -> bool:
        for _ in range(_TRIES):
            kill = _choose(beginning.run, rng)
            outcome.story.append(f"{outcome.command} killed {kill}")
            ended = self.bench.run(scenario.new, kill)
            if ended.left_running:
                outcome.blame("different", ["a child of the killed process went on"])
            if ended.code < 0:
                outcome.kills += 1
                return True
            if ended.code:
                outcome.blame("different", [f"exit code {ended.code}: {ended.said[-400:]}"])
            outcome.story.append(f"it had ended with {ended.code}")
            self.bench.reset(beginning.template)
        return False

    def _disturb(
        self, scenario: Scenario, beginning: Beginning, rng: random.Random, outcome: Outcome
    ) -> None:
        """Kills a reader, or the command that is to put things right."""
        if rng.random() < _AGAIN and scenario.readers:
            task = rng.choice([*scenario.readers.values()])
            kill = Kill(at=rng.randint(1, _READING_OPERATIONS))
            outcome.story.append(f"a reader killed {kill}")
        else:
            task, kill = scenario.new, _choose(beginning.run, rng)
            outcome.story.append(f"again, killed {kill}")
        ended = self.bench.run(task, kill)
        outcome.kills += ended.code < 0

    def _read(self, scenario: Scenario, check: _Check) -> None:
        for name, reader in scenario.readers.items():
            check.read(name, self.bench.run(reader))
        (self.bench.work / "seen.html").unlink(missing_ok=True)

    def beginning(self, command: str, number: int) -> Beginning:
        """A state to begin from: 0 is without a result."""
        if (command, number) not in self._beginnings:
            self._beginnings[command, number] = self._prepared(command, number)
        return self._beginnings[command, number]

    def check(self, command: str, beginning: Beginning, outcome: Outcome) -> _Check:
        """What is asked of the state that is there now."""
        return _Check(self.bench.work, SCENARIOS[command], beginning, outcome, self._inputs)

    def again(self, command: str, beginning: Beginning, outcome: Outcome) -> None:
        """Runs the command again, undisturbed: all must be as if nothing had happened."""
        ended = self.bench.run(SCENARIOS[command].new)
        if ended.code:
            outcome.blame("different", [f"exit code {ended.code}: {ended.said[-400:]}"])
            return
        self.check(command, beginning, outcome).finished(tree(self.bench.temporary))

    def _prepared(self, command: str, number: int) -> Beginning:
        scenario, template = SCENARIOS[command], self._root / f"{command}-{number}"
        self.bench.reset(self._root / "inputs")
        if number:
            ended = self.bench.run(scenario.olds[number - 1])
            assert ended.code == 0, ended.said
        _write(self.bench.work / "out" / "res", scenario.inside if number else {})
        shutil.copytree(self.bench.work, template, symlinks=True)
        trees, outcome = [], set(pairs(template).values())
        texts: dict[str, bytes] = {}
        for _ in range(_RUNS):
            self.bench.reset(template)
            ended = self.bench.run(scenario.new)
            assert ended.code == 0, ended.said
            trees.append(tree(self.bench.work))
            outcome |= set(pairs(self.bench.work).values())
            texts = texts or {
                name: (self.bench.work / name).read_bytes()
                for name in trees[0]
                if name.endswith(".json")
            }
        assert not trees[0].keys() ^ trees[1].keys(), trees[0].keys() ^ trees[1].keys()
        sizes = [(self.bench.work / n).stat().st_size for n in trees[0].keys() - FOREIGN.keys()]
        result = Result(trees, texts, sizes, outcome, scenario.may_vary)
        return Beginning(template, tree(template), result, ended)


def _choose(run: Ended, rng: random.Random) -> Kill:
    group = rng.random() < _GROUP
    if rng.random() < _TIMED:
        return Kill(after_s=rng.uniform(0.0, run.seconds), group=group)
    if rng.random() < _LATE and run.late:
        return Kill(rng.choice(run.late), group=group)
    return Kill(rng.randint(1, run.count), group=group)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@dataclass
class _Check:
    """Holds what is there against what may be there."""

    work: Path
    scenario: Scenario
    beginning: Beginning
    outcome: Outcome
    inputs: Tree

    def as_a_stranger_reads(self) -> None:
        """Nobody who knows nothing of depthcut may meet a mixed pair."""
        start, result = self.beginning.start, self.beginning.result
        try:
            outcome = pairs(self.work)
        except ValueError as error:
            self.outcome.blame("mixed", [f"at once: {error}"])
            return
        odd = (name for name, pair in outcome.items() if pair not in result.pairs)
        self.outcome.blame("mixed", (f"at once: {name} and its weights" for name in odd))
        kept = {n for n in result.names(start) if n.endswith(".onnx") and n in shown(start)}
        self.outcome.blame("lost", (f"at once: {name}" for name in kept - outcome.keys()))
        self._untouched()

    def read(self, name: str, ended: Ended) -> None:
        """A reader may find nothing where nothing is."""
        if ended.code and (self.work / name).exists():
            self.outcome.blame(
                "lost", [f"{name} is refused with {ended.code}: {ended.said[-300:]}"]
            )

    def whole(self) -> None:
        """Each result is the old one or the new one."""
        now = tree(self.work)
        for part, growing in self._parts():
            here = {n: content for n, content in shown(now).items() if part(n) and n[-1] != "/"}
            if not growing:
                self._old_or_new(here, part)
        self.outcome.blame("mixed", broken_promises(self.work))
        self._untouched()

    def _parts(self) -> Iterator[tuple[_Part, bool]]:
        apart, growing = self.scenario.apart, self.scenario.growing
        yield from ((_Part((start,)), False) for start in apart)
        yield from ((_Part((start,)), True) for start in growing)
        yield _Part((*apart, *growing), inverted=True), False

    def _old_or_new(self, now: Tree, part: _Part) -> None:
        start, result = self.beginning.start, self.beginning.result
        old = {name: content for name, content in shown(start).items() if part(name)}
        new = {name: content for name, content in shown(result.trees[0]).items() if part(name)}
        if now == old or (now.keys() == new.keys() and self._is_new(now, old, new)):
            return
        lost = (old.keys() & new.keys()) - now.keys()
        self.outcome.blame("lost", sorted(lost))
        self.outcome.blame("stale", sorted(now.keys() - old.keys() - new.keys()))
        changed = sorted(n for n in now if now[n] not in (old.get(n), new.get(n)))
        texts = {
            n: "old" if now[n] == old.get(n) else "new" for n in now if old.get(n) != new.get(n)
        }
        self.outcome.blame("mixed", [f"{texts}, changed: {changed}, missing: {sorted(lost)}"])

    def _is_new(self, now: Tree, old: Tree, new: Tree) -> bool:
        varying = self.beginning.result.varying
        return all(
            now[name] != old.get(name) if name in varying else now[name] == content
            for name, content in new.items()
        ) and not list(self._other_texts(varying & now.keys()))

    def _other_texts(self, names: Iterable[str]) -> Iterator[str]:
        texts = self.beginning.result.texts
        for name in sorted(names):
            if name in texts:
                now = (self.work / name).read_bytes()
                if parents(now) != parents(texts[name]) or not same_json(now, texts[name]):
                    yield name

    def finished(self, temporary: Tree) -> None:
        """After the same command again everything is as if nobody had killed it."""
        now, result = tree(self.work), self.beginning.result
        expected, varying = result.trees[0], result.varying
        self.outcome.blame("stale", (f"temporary: {name}" for name in sorted(temporary)))
        self.outcome.blame("stale", sorted(now.keys() - expected.keys()))
        self.outcome.blame("lost", sorted(expected.keys() - now.keys()))
        both = now.keys() & expected.keys()
        others = sorted(n for n in both - varying if now[n] != expected[n])
        self.outcome.blame("different", [*others, *self._other_texts(varying & both)])
        self.outcome.blame("different", broken_promises(self.work))
        self._untouched()

    def _untouched(self) -> None:
        names = (name for name in FOREIGN if not _holds(self.work / name, FOREIGN[name]))
        self.outcome.blame("lost", (f"the user's {name}" for name in names))
        if self.beginning.start.keys() - FOREIGN.keys():
            inside, at = self.scenario.inside, self.work / "out" / "res"
            names = (name for name in inside if not _holds(at / name, inside[name]))
            self.outcome.blame("lost", (f"the user's {name} in a result" for name in names))
        if tree(self.work / "in") != self.inputs:
            self.outcome.blame("lost", ["an input was changed"])


@dataclass(frozen=True)
class _Part:
    """The names that begin as one of these expressions says, or as none of them does."""

    starts: tuple[str, ...]
    inverted: bool = False

    def __call__(self, name: str) -> bool:
        return bool(re.match("|".join(self.starts) or "$", name)) != self.inverted


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


_SWEEP = """\
models: [llama]
plans: [{plans}]
precisions: [fp32]
shapes: {{prefill: [8], decode_past: [8]}}
scoring: {{calibration: text.txt, samples: 2, sequence_length: 16, batch_size: 2}}
measuring:
  {{rounds: 2, eval_text: other.txt, eval_tokens: 32, eval_sequence_length: 16, threads: 1,
   agreement_prompts: 0}}
"""


def write_inputs(folder: Path, names: Sequence[str]) -> None:
    """Makes what the scenarios of these names are given, without any command of depthcut."""
    from tests.text_graphs import WORDS, write_llama_folder, write_tokenizer

    folder.mkdir(parents=True)
    words = [WORDS[(7 * n + n // 5) % len(WORDS)] for n in range(600)]
    (folder / "text.txt").write_text(" ".join(words[:400]), encoding="utf-8")
    (folder / "other.txt").write_text(" ".join(words[150:][::-1]), encoding="utf-8")
    (folder / "search.yaml").write_text("search_tokens: 32\nshortlist: 3\n", encoding="utf-8")
    (folder / "short.yaml").write_text("agreement_prompts: 0\n", encoding="utf-8")
    (folder / "build.yaml").write_text("optimization_level: 0\n", encoding="utf-8")
    (folder / "budget.yaml").write_text("check_text: in/other.txt\n", encoding="utf-8")
    _write_graphs(folder)
    write_tokenizer(folder / "whole")
    _write_engine(folder / "engine")
    if any("torch" in SCENARIOS[name].needs for name in names):
        write_llama_folder(folder / "llama")
        _write_plans(folder)
    for name, plans in {"one": "attention:1", "two": "attention:1, mlp:1"}.items():
        (folder / f"{name}.yaml").write_text(_SWEEP.format(plans=plans), encoding="utf-8")


def _write_graphs(folder: Path) -> None:
    import onnx_ir as ir

    from graph_passes import save_model
    from tests.llama_shaped import LlamaShape, write_llama
    from tests.tiny_graphs import TinySpec, tiny_model

    for name, layers in {"whole": 3, "cut": 2}.items():
        shape = LlamaShape(
            layers=layers, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=64,
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        (folder / name).mkdir()
        write_llama(folder / name / "model.onnx", shape, noise=0.1)
    save_model(tiny_model(TinySpec(layers=2)), folder / "tiny.onnx")
    for name, layers in {"encoder": 3, "encoder-cut": 2}.items():
        (folder / name).mkdir()
        encoder = tiny_model(TinySpec(layers=layers, cache=False))
        file = folder / name / "model.onnx"
        ir.save(encoder, file, external_data="model.onnx.data", size_threshold_bytes=0)


def _write_engine(folder: Path) -> None:
    from tests.engine_support import written

    folder.mkdir()
    written(folder)


def _write_plans(folder: Path) -> None:
    from exporter.artifacts.plans import parse_drops
    from exporter.cli import run

    here = Path.cwd()
    os.chdir(folder.parent)
    try:
        result = (
            "score",
            "in/llama",
            "-o",
            "in/importance.json",
            *SCORING,
            "--samples",
            "16",
            "-q",
        )
        assert run(result) == 0
    finally:
        os.chdir(here)
    for name, drops in {
        "plan": ["attention:1"],
        "blocks": ["block:1"],
        "wide": ["attention:0", "mlp:2"],
    }.items():
        parse_drops(drops).write(folder / f"{name}.json")


def once_exported(folder: Path) -> None:
    """Traces each model once, however often it is exported, and gives the same each time."""
    import torch

    from tests.exports_once import ExportsOnce

    class Kept(ExportsOnce):
        def __call__(self, model: Any, *arguments: Any, **options: Any) -> Any:
            super().__call__(model, *arguments, **options)
            return super().__call__(model, *arguments, **options)  # what is kept differs in form

    folder.mkdir(exist_ok=True)
    torch.onnx.export = Kept(torch.onnx.export, folder)
