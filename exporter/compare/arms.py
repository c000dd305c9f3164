"""The arms of a comparison: what runs, and the files that tell about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from exporter.artifacts import (
    FLOAT_BASELINE,
    FLOAT_CANDIDATE,
    FORM_KEY,
    QUANTIZATION_KEY,
    RUN_IN_FP32,
    Arm,
    Arms,
    EngineFacts,
    FormRecord,
    PlannedDeletion,
    QuantizationRecord,
    Record,
)
from exporter.artifacts.latency import Shape
from exporter.compare.options import CompareOptions
from exporter.compare.timing.subjects import RunnerArm, loaded
from exporter.engines.runners.base import Runner
from exporter.engines.runners.tensorrt import OnEngines, Turns
from exporter.engines.tensors import TOKEN_INPUTS
from exporter.errors import ComparisonError
from exporter.models.graph_facts import CACHE_INPUT, GraphFacts
from exporter.models.model_folder import PIXELS, ModelFolder
from exporter.progress import QUIET, Progress
from graph_passes.files.reading import parse_json
from graph_passes.plan_record import PLAN_KEY

_R = TypeVar("_R", bound=Record)
LeaveOut = Callable[[str], None]
"""Is told in words what can't be timed."""


@dataclass(frozen=True)
class ComparedArm:
    """One side: what runs, where it came from, and what its files tell."""

    builds: tuple[Runner, ...]
    folder: ModelFolder
    facts: GraphFacts
    engines: tuple[EngineFacts, ...] = ()
    not_run: str | None = None  # None where they do
    prefix: str = ""
    judge: Callable[[Progress, Turns | None], AbstractContextManager[Runner]] | None = None
    pruned: bool | None = None  # None: as its file says
    quantized: bool | None = None
    encoder_layers: int | None = None
    cells: Callable[[CompareOptions, LeaveOut], tuple[list[Shape], list[Shape]]] | None = None
    timed_on: str = ""  # a hash of what its runs read, where that isn't made of numbers alone

    @property
    def runner(self) -> Runner:
        """The first build's."""
        return self.builds[0]

    def own_caches(self, other: ComparedArm) -> set[str]:
        """The caches of another arm that have no like here, since another library keeps them."""
        if other.runner.backend == self.runner.backend:
            return set()
        return {spec.name for spec in other.runner.inputs if CACHE_INPUT.fullmatch(spec.name)}

    @property
    def quantization(self) -> QuantizationRecord | None:
        """What its graph notes of its quantisation."""
        return _noted(QuantizationRecord, self.facts, QUANTIZATION_KEY)

    def plan(self) -> list[PlannedDeletion]:
        """What its metadata say was cut out of it."""
        return noted_plan(self.facts, str(self.folder.onnx))

    @property
    def is_pruned(self) -> bool:
        """Whether something was cut out of it."""
        return bool(self.plan()) if self.pruned is None else self.pruned

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are in fewer bits."""
        return self.quantization is not None if self.quantized is None else self.quantized

    def record(self) -> Arm:
        """What the report says of it."""
        facts, runner = self.facts, self.builds[0] if self.builds else None
        able = runner.capabilities if runner else None
        return Arm(
            backend=runner.backend if runner else self.engines[0].backend,
            provider=runner.provider if runner else "none",
            precision=f"{facts.precision}{RUN_IN_FP32 if able and able.widened else ''}",
            path=f"{self.prefix}{self.folder.onnx}",
            sha256=facts.sha256,
            file_bytes=facts.file_bytes,
            parameters=facts.parameters,
            nodes=facts.nodes,
            kv_cache_bytes_per_token=facts.kv_cache_bytes_per_token,
            engines=list(self.engines),
            not_run=self.not_run,
            device_memory_bytes=able.gpu_memory_bytes if able else None,
            notes=list(dict.fromkeys(n for arm in self.builds for n in arm.capabilities.notes)),
            encoder_layers=self.encoder_layers,
            form=_noted(FormRecord, facts, FORM_KEY),
            quantization=self.quantization,
        )


@dataclass(frozen=True)
class Comparison:
    """Arms by name, and the one that all others are held against; the report's pair comes first."""

    arms: Mapping[str, ComparedArm]
    reference: str = "baseline"
    options: CompareOptions = field(default_factory=CompareOptions)
    progress: Progress = QUIET
    timed_alone: AbstractSet[str] = frozenset()  # arms whose answers aren't judged
    left_out: dict[str, None] = field(default_factory=dict)  # what was to be timed, in words

    def leave_out(self, words: str) -> None:
        """Tells that something can't be timed, now and in the report."""
        self.progress.say(words)
        self.left_out[words] = None

    @property
    def pair(self) -> tuple[str, str]:
        """The names of the report's two sides; a single arm is both."""
        first, second, *_ = *self.arms, *self.arms
        return first, second

    @property
    def whole(self) -> ComparedArm:
        """The pair's first arm."""
        return self.arms[self.pair[0]]

    @property
    def judged(self) -> dict[str, ComparedArm]:
        """The arms whose answers are judged, by name."""
        return {name: arm for name, arm in self.arms.items() if name not in self.timed_alone}

    @property
    def grid(self) -> tuple[str, ...]:
        """The arms that stand in one table, those in float first; none for a pair alone."""
        floats = [name for name in (FLOAT_BASELINE, FLOAT_CANDIDATE) if name in self.arms]
        names = dict.fromkeys((*floats, *self.judged))
        return tuple(names) if len(names) > len(self.pair) else ()

    @property
    def held_against(self) -> list[tuple[str, str]]:
        """Which is held against which, the other first: the pair, then all by the reference."""
        others = ((self.reference, name) for name in self.grid if name != self.reference)
        return list(dict.fromkeys([self.pair, *others]))

    @property
    def tokenizer(self) -> Path | None:
        """That of the first arm of the pair that has one."""
        folders = (self.arms[name].folder for name in self.pair)
        return next((folder.tokenizer for folder in folders if folder.tokenizer), None)

    @property
    def runs(self) -> bool:
        """Whether all arms can run here."""
        return all(arm.builds for arm in self.arms.values())

    @property
    def on_gpu(self) -> bool:
        """Whether the first arm runs on one."""
        return self.whole.runner.capabilities.device == "gpu"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Loads a runner of each arm; engines that don't fit together take turns."""
        with loaded([arm.builds for arm in self.arms.values()], self.progress):
            yield

    def timed(self) -> dict[str, RunnerArm]:
        """The arms as single runs of theirs are timed."""
        vocabulary = self.vocabulary()
        return {name: RunnerArm(arm.builds, vocabulary) for name, arm in self.arms.items()}

    @contextmanager
    def judging(self) -> Iterator[Comparison]:
        """The same with runners whose answers can be judged; the arms are running.

        Those that can't be are off the device meanwhile.
        """
        judges = [(name, arm, arm.judge) for name, arm in self.judged.items() if arm.judge]
        if not judges:
            yield self
            return
        for _, arm, _ in judges:
            arm.runner.__exit__(None, None, None)
        turns = next((engine.turns for engine in self._on_engines), None)
        with ExitStack() as stack:
            able = {
                name: replace(arm, builds=(stack.enter_context(judge(self.progress, turns)),))
                for name, arm, judge in judges
            }
            yield replace(self, arms={**self.arms, **able})
        for _, arm, _ in judges:
            arm.runner.__enter__()

    @property
    def _on_engines(self) -> list[OnEngines]:
        builds = (runner for arm in self.arms.values() for runner in arm.builds)
        return [runner for runner in builds if isinstance(runner, OnEngines)]

    @property
    def in_turns(self) -> bool:
        """Whether engines of the arms are loaded in turns."""
        return any(runner.turns is not None for runner in self._on_engines)

    def dropped(self) -> list[PlannedDeletion]:
        """What the second arm's metadata say was cut, and the first's don't."""
        already, plan = (self.arms[name].plan() for name in self.pair)
        return [deletion for deletion in plan if deletion not in already]

    def records(self) -> Arms:
        """What the report says of all arms."""
        first, second, *others = (arm.record() for arm in self.arms.values())
        names = [*self.arms][len(self.pair) :]
        return Arms(
            baseline=first, candidate=second, references=dict(zip(names, others, strict=True))
        )

    @property
    def reads_images(self) -> bool:
        """Whether the arms read images."""
        return PIXELS in {spec.name for spec in self.whole.runner.inputs}

    def vocabulary(self) -> int:
        """How many tokens the models know; 1 of models that read images in place of tokens."""
        folder = self.whole.folder
        if folder.classifies_images or PIXELS in self.whole.facts.inputs:
            return 1
        tables = (arm.facts.vocabulary for arm in self.judged.values())  # a quantised one hides it
        number = next(filter(None, tables), folder.config.get("vocab_size"))
        if not isinstance(number, int) or number < 1:
            raise ComparisonError(
                f"{folder.onnx} doesn't say how many tokens its vocabulary has.",
                "Put the model's own config.json next to it, which has vocab_size.",
                code="config-missing",
            )
        return number

    def refuse_other_models(self, *, running: bool) -> None:
        """Refuses arms that don't take and give the same, as far as that is known by now."""
        tables = (arm.facts.vocabulary for arm in self.arms.values())  # a quantised one hides it
        ours = next(filter(None, tables), None)
        for name, arm in [*self.arms.items()][1:]:
            beside, size = name not in self.pair, arm.facts.vocabulary or ours
            words = f"it knows {size} tokens, not {ours}" if beside and size != ours else ""
            if not words and (running or not beside):
                words = self._other_interface(arm, beside, running)
            if words:
                is_float = name in (FLOAT_BASELINE, FLOAT_CANDIDATE)
                title = f"reference {name}" if beside and not is_float else name
                raise ComparisonError(
                    f"The {title} and the {self.pair[0]} are of different models: {words}.",
                    "Compare a model with its own pruned form, the whole one first.",
                    code="other-model",
                )

    def _other_interface(self, arm: ComparedArm, beside: bool, running: bool) -> str:
        """What an arm takes or gives, and the whole model doesn't; empty where nothing.

        Those beside the pair may want positions or token types that its graphs make by themselves,
        and another library's may keep their caches in another form.
        """
        known, own = (
            {spec.name for spec in one.runner.inputs} if running else {*one.facts.inputs}
            for one in (self.whole, arm)
        )
        more = TOKEN_INPUTS | self.whole.own_caches(arm) if beside else set()
        if known and (foreign := own - known - more):
            return f"it has the inputs {sorted(foreign)}"
        results = [_results(one.runner) if running else set() for one in (self.whole, arm)]
        if results[0] != results[1]:
            return f"their outputs are {sorted(results[0])} and {sorted(results[1])}"
        return ""


def noted_plan(facts: GraphFacts, file: str) -> list[PlannedDeletion]:
    """What a graph's metadata say was cut out of it."""
    text = facts.metadata.get(PLAN_KEY)
    if text is None:
        return []
    where = f"{file}: the metadata entry {PLAN_KEY}"
    try:
        return TypeAdapter(list[PlannedDeletion]).validate_python(parse_json(text, where))
    except (ValueError, ValidationError) as error:
        raise ComparisonError(
            f"{where} is not a list of deletions.", code="broken-plan-record"
        ) from error


def _noted(kind: type[_R], facts: GraphFacts, key: str) -> _R | None:
    """What the graph notes of itself; None where that is nothing, or not ours."""
    try:
        return kind.model_validate_json(facts.metadata[key])
    except (KeyError, ValidationError):
        return None


def _results(runner: Runner) -> set[str]:
    return {spec.name for spec in runner.outputs if not spec.name.startswith("present")}
