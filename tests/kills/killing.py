"""One kill: a state to begin from, a moment, and what must hold afterwards."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.command_inputs import write_inputs
from tests.kills.bench import Bench, Ended, Task
from tests.kills.scenarios import FOREIGN, SCENARIOS, Scenario
from tests.kills.ticks import Kill
from tests.kills.trees import Result, Tree, broken_promises, pairs, same_json, shown, tree

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

    def ended_well(self, ended: Ended) -> bool:
        """Whether a run that nobody killed succeeded."""
        if ended.code:
            self.blame("different", [f"exit code {ended.code}: {ended.said[-400:]}"])
        return not ended.code


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
        self._sound(lambda: write_inputs(Path("in")))
        (self.bench.work / "out").mkdir()
        _write(self.bench.work, FOREIGN)
        self._inputs = tree(self.bench.work / "in")
        shutil.copytree(self.bench.work, root / "inputs", symlinks=True)

    def kill(self, command: str, seed: int) -> Outcome:
        """Kills a command, looks what it left, and runs it again."""
        rng = random.Random(f"{command}:{seed}")
        scenario, outcome = SCENARIOS[command], Outcome(command, seed)
        numbers = [1, 0, *range(2, 1 + len(scenario.olds))]
        key = command, rng.choice(numbers[: self._most])
        if key not in self._beginnings:
            self._beginnings[key] = self._prepared(*key)
        beginning = self._beginnings[key]
        check = _Check(self.bench.work, scenario, beginning, outcome, self._inputs)
        self.bench.reset(beginning.template)
        if not self._killed(scenario, beginning, rng, outcome):
            outcome.story.append("it had ended each time")
            return outcome
        check.as_a_stranger_reads()
        if rng.random() < _AGAIN:
            self._disturb(scenario, beginning, rng, outcome)
            check.as_a_stranger_reads()
        for name, reader in scenario.readers.items():
            ended = self.bench.run(reader)
            if ended.code and (self.bench.work / name).exists():
                outcome.blame("lost", [f"{name} is refused, {ended.code}: {ended.said[-300:]}"])
        (self.bench.work / "seen.html").unlink(missing_ok=True)
        check.whole()
        if outcome.ended_well(self.bench.run(scenario.task(0))):
            check.finished(tree(self.bench.temporary))
        return outcome

    def _killed(
        self, scenario: Scenario, beginning: Beginning, rng: random.Random, outcome: Outcome
    ) -> bool:
        for _ in range(_TRIES):
            kill = _choose(beginning.run, rng)
            outcome.story.append(f"{outcome.command} killed {kill}")
            ended = self.bench.run(scenario.task(0), kill)
            if ended.left_running:
                outcome.blame("different", ["a child of the killed process went on"])
            if ended.code < 0:
                outcome.kills += 1
                return True
            outcome.ended_well(ended)
            self.bench.reset(beginning.template)
        return False

    def _disturb(
        self, scenario: Scenario, beginning: Beginning, rng: random.Random, outcome: Outcome
    ) -> None:
        """Kills a reader, or the command that is to put things right."""
        if rng.random() < _AGAIN:
            task = rng.choice([*scenario.readers.values()])
            kill = Kill(at=rng.randint(1, _READING_OPERATIONS))
        else:
            task, kill = scenario.task(0), _choose(beginning.run, rng)
        outcome.story.append(f"then {task} killed {kill}")
        outcome.kills += self.bench.run(task, kill).code < 0

    def _prepared(self, command: str, number: int) -> Beginning:
        """A state to begin from: 0 is without a result."""
        scenario, template = SCENARIOS[command], self._root / f"{command}-{number}"
        self.bench.reset(self._root / "inputs")
        if number:
            self._sound(scenario.task(number))
            _write(self.bench.work / "out" / "res", scenario.inside)
        shutil.copytree(self.bench.work, template, symlinks=True)
        trees, allowed = [], set(pairs(template).values())
        for _ in range(_RUNS):
            self.bench.reset(template)
            ended = self._sound(scenario.task(0))
            trees.append(tree(self.bench.work))
            allowed |= set(pairs(self.bench.work).values())
        assert trees[0].keys() == trees[1].keys(), trees[0].keys() ^ trees[1].keys()
        texts = {n: (self.bench.work / n).read_bytes() for n in trees[0] if n.endswith(".json")}
        result = Result(trees, texts, allowed, scenario.may_vary)
        return Beginning(template, tree(template), result, ended)

    def _sound(self, task: Task) -> Ended:
        ended = self.bench.run(task)
        assert ended.code == 0, ended.said
        return ended


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
        kept = {n for n in shown(start) if n.endswith(".onnx") and n in result.trees[0]}
        self.outcome.blame("lost", (f"at once: {name}" for name in kept - outcome.keys()))
        self._untouched()

    def whole(self) -> None:
        """Each result is the old one or the new one; what grows may be in between."""
        now, apart = shown(tree(self.work)), self.scenario.apart
        others = "|".join([*apart, *self.scenario.growing])
        for part in (*apart, f"(?!{others or '$'})"):
            self._old_or_new(now, re.compile(part))
        self.outcome.blame("mixed", broken_promises(self.work))
        self._untouched()

    def _old_or_new(self, now: Tree, part: re.Pattern[str]) -> None:
        start, result = self.beginning.start, self.beginning.result
        now, old, new = ({n: text for n, text in shown(stand).items() if part.match(n)}
        for stand in (now, start, result.trees[0]))  # fmt: skip
        if now == old or (now.keys() == new.keys() and self._is_new(now, old, new)):
            return
        appeared = {name: text for name, text in new.items() if name in now}
        is_first = self.scenario.in_stages and not any(n.startswith("out/res/") for n in old)
        if is_first and now.keys() == appeared.keys() and self._is_new(now, {}, appeared):
            return  # each stage appears as it is finished
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
            if name in texts and not same_json((self.work / name).read_bytes(), texts[name]):
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


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


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
