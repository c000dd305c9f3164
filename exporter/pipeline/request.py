"""What `depthcut export` is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from exporter.artifacts import Target
from exporter.artifacts.servers import Server
from exporter.choose.budgets.budget import DROPPING, OF_SEARCHES, Budget, SearchOptions
from exporter.choose.budgets.settings import PlanSettings, idle_rule, usual_heal
from exporter.compare.options import CompareOptions
from exporter.engines.build.settings import ENGINES, BuildSettings
from exporter.export.options import USUAL_ROOM, ExporterName
from exporter.heal.options import TRAINED, HealOptions
from exporter.models.loading.sources import LOADING, SourceOptions
from exporter.models.texts.self_text import SAMPLED
from exporter.option_types import (
    Count,
    Dtype,
    Engine,
    InputFile,
    InputPath,
    OutputFolder,
    Whole,
    Written,
)
from exporter.options import (
    Options,
    Rule,
    argument,
    dataclass,
    excludes,
    is_given,
    only_with,
    option,
    part,
    required,
    value_at,
)
from exporter.quantize.settings import QuantizeSettings
from exporter.score.options import ScoreOptions

QUICK: Mapping[str, Any] = {
    "calibration": ("pydoc",),
    "samples": 8,
    "sequence_length": 256,
    "search_tokens": 512,
    "shortlist": 8,
    "time_budget": 10.0,
    "eval_tokens": 2048,
    "agreement_prompts": 2,
}
"""What --quick asks for, unless it is asked for otherwise."""
OF_TEXTS = ("calibration", "sequence_length", "search_tokens", "agreement_prompts")
"""What of it an encoder-decoder has no use for."""


@dataclass(frozen=True)
class DropRequest(Options):
    """What to drop: whatever holds a budget, such as a number of attentions, or a plan's file."""

    budget: Budget | None = part(None)
    plan: InputFile | None = option(None, "Drop what this plan.json lists.", section=DROPPING)
    rules = (
        Rule(
            ("plan",),
            lambda given: (given.plan is None) == (given.budget is None),
            "Say what to drop, with one of these:",
            "--drop-attn N, --drop-mlp N, --drop-block N, --drop-joint N, or a budget such as "
            "--faster 1.2x; for export also {0}.",
        ),
    )

    def __post_init__(self) -> None:
        if self.budget is not None:
            self.budget.refuse_empty()


@dataclass(frozen=True)
class EngineRequest(Options):
    """The engines that are built of both models."""

    section = ENGINES
    switch = "backend"
    backend: Engine = option(
        "tensorrt-rtx",
        "Also build engines of both; they are compared, too.",
        "--engine",
        usual="none",
    )
    builds: Count = option(
        1, "Build each engine N times (-b1, -b2, ...), since builds may differ in speed."
    )
    settings: BuildSettings = part(BuildSettings(), without=("workspace_bytes",))
    split: bool | None = option(
        None,
        "Build one engine for each phase, or one for both, which has the weights twice.",
        usual="one for each, where caches have a fixed length",
    )


def _goes_by_scores(request: ExportRequest) -> bool:
    budget = request.drops.budget
    return budget is not None and budget.only_counts and not request.search.by_damage


def _needs_weights(request: ExportRequest) -> bool:
    budget, search = request.drops.budget, request.search.search
    searches = search not in (None, "one-shot") or (budget is not None and not budget.only_counts)
    return searches or request.heal is not None


def _of_one_graph(name: str, given: Callable[[ExportRequest], bool] | None = None) -> Rule:
    """A rule: an encoder-decoder is not exported with it."""
    is_said = given or partial(is_given, name=name)
    return Rule(
        (name,),
        lambda request: request.in_stacks and is_said(request),
        "{0} is for models of one graph. An encoder-decoder becomes three, and is healed on the "
        "pairs that it is scored on, without a training.",
        "Leave {0} out.",
        "one-graph-option",
    )


def _trains(name: str, request: ExportRequest) -> bool:
    heal = request.heal
    return heal is not None and heal.kind == "auto" and is_given(heal, name)


def _heals_otherwise(name: str, request: ExportRequest) -> bool:
    """Whether healing is to take other texts than scoring."""
    usual = getattr(request.score, name)
    return is_given(request, f"heal.{name}") and value_at(request, f"heal.{name}") != usual


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Options):
    """Everything that `depthcut export` needs to know."""

    rare = (
        *("protect", "samples", "sequence_length", "threads", "rounds", "eval_tokens"),
        *("other_text", "task_data", "revision"),
    )
    config_only = (
        *("context", "min_top1_agreement", "min_embedding_cosine", "objective", "check_text"),
        *("heal_calibration", "batch_size", "blocks", "batch", "time_budget", "prompts"),
        *("task_limit", "quantize_method", "gguf", "builds", "split"),
        *("compute_capability", "logits"),
    )
    source: str = argument("MODEL")
    out: OutputFolder = required("Folder for all results.", "-o", "--output")
    target: Target = option(
        "portable",
        "Runtime to write both graphs for. They get its fastest form; for onnxruntime-*, most "
        "decoders need the extra genai.",
        usual="portable; without a number, goal or plan onnxruntime-cpu, with that extra",
    )
    exporter: ExporterName | None = option(
        None,
        "For --target portable: PyTorch's own ONNX exporter, or optimum's (extra: optimum).",
        usual="torch",
        config_only=True,
    )
    opset: Annotated[int, Field(ge=18, le=23), Written("N")] | None = option(
        None, "For --target portable: the ONNX opset, 18 to 23.", usual="20", config_only=True
    )
    cache_length: Whole | None = option(
        None,
        "For --target tensorrt and tensorrt-rtx: length of the caches, which are updated in "
        "place; 0 makes caches that grow.",
        usual="4096, or the model's maximum if that is less",
        config_only=True,
    )
    pooling: bool = option(
        False,
        "For a folder of sentence-transformers: put its pooling and normalisation into both "
        "graphs, as a further output, sentence_embedding.",
        rare=True,
    )
    checkpoint: bool = option(
        False,
        "Also write a Hugging Face checkpoint of the pruned model; checkpoint/, without the "
        "dropped weights.",
    )
    compared: bool = option(
        True,
        "Run both models at the end and write the report. Use --no-measure on a machine that "
        "can write the models but not run them.",
        "--measure/--no-measure",
        rare=True,
    )
    also: tuple[InputPath, ...] = option(
        (),
        "Another form of the model, such as another cut: an ONNX file or folder that is compared "
        "with the others, in one table. Repeatable.",
        rare=True,
    )
    redo: bool = option(False, "Run stages again whose results are still valid.")
    drops: DropRequest = part()
    server: Server | None = option(
        None,
        "The runtime that will serve the model: the plan keeps what it can't do without, and "
        "replacements are such that it can hold.",
        "--for",
        usual="any",
        section=DROPPING,
        rare=True,
    )
    allow_empty: bool = option(
        False,
        "Drop the sublayers even if no attention and no MLP is left.",
        section=DROPPING,
        config_only=True,
    )
    search: SearchOptions = part(SearchOptions())
    score: ScoreOptions = part(ScoreOptions())
    heal: HealOptions | None = part(None)
    compare: CompareOptions = part(CompareOptions())
    quantize: QuantizeSettings | None = part(None)
    engines: EngineRequest | None = part(None)
    load: SourceOptions = part(SourceOptions())
    stream: bool = option(
        False,
        "Read the weights a layer at a time; for models larger than memory.",
        section=LOADING,
    )
    stream_dir: OutputFolder | None = option(
        None,
        "For --stream: folder for a file with the hidden states.",
        usual="in memory if they fit, otherwise in TMPDIR or /var/tmp",
        section=LOADING,
        config_only=True,
    )
    choose_dtype: Dtype | None = None  # None: as both models are written
    shared: OutputFolder | None = option(
        None,
        "Take finished stages from this folder and leave new ones there, so that a model is scored "
        "and exported once for several output folders.",
        metavar="DIR",
        config_only=True,
    )
    refuses_useless: bool = False
    in_stacks: bool = False

    rules = (
        *map(_of_one_graph, ("target", "pooling", "checkpoint", "also", "server", "stream")),
        *map(_of_one_graph, ("quantize", "engines", "heal.check_text")),
        _of_one_graph("exporter", lambda given: given.exporter == "optimum"),
        # ONNX Runtime's CPU runs none.
        _of_one_graph("load.dtype", lambda given: given.load.dtype == "bfloat16"),
        *(
            _of_one_graph(f"heal.{name}", partial(_heals_otherwise, name))
            for name in ("calibration", "samples")
        ),
        *(
            _of_one_graph(f"heal.{name}", partial(_trains, name))
            for name in (*TRAINED, "replacements")
        ),
        only_with("stream_dir", "stream"),
        Rule(
            ("stream",),
            lambda given: given.stream and _needs_weights(given),
            "{0} never has the whole model in memory, as healing, a goal and a search want it.",
            "Make the plan on a machine that holds the model, and give it with --plan.",
        ),
        Rule(
            ("stream", "exporter"),
            lambda given: given.stream and given.exporter == "optimum",
            "{0} never has the whole model in memory, as optimum wants it.",
            "Say {1} torch.",
        ),
        Rule(
            ("cache_length",),
            lambda given: bool(given.cache_length) and given.compare.longest > given.cache_length,
            "{0} is too short for what is measured.",
            "Say more positions, or measure shorter texts.",
        ),
        Rule(
            ("quantize.scheme", "target"),
            lambda given: (
                given.quantize is not None
                and given.quantize.scheme != "int8-qdq"
                and (given.engines is not None or given.target.startswith("tensorrt"))
            ),
            "TensorRT's parser takes no graph in such a scheme.",
            "Say {0} int8-qdq, with a --calibration text.",
        ),
        *(
            excludes("stream", f"load.{danger}", "it reads safetensors a layer at a time")
            for danger in ("trust_remote_code", "allow_pickle")
        ),
        excludes("drops.plan", "search", "a plan file says what is dropped"),
        *(
            idle_rule(name, _goes_by_scores)
            for name in (
                *("drops.budget.at", "drops.budget.kinds"),
                *(f"search.{name}" for name in OF_SEARCHES),
            )
        ),
        Rule(
            ("drops.budget.at", "target"),
            lambda given: (
                value_at(given, "drops.budget.at") is not None
                and given.target.startswith("tensorrt")
            ),
            "{0} is timed on ONNX Runtime, which can't run the graphs of {1} tensorrt.",
            "Make the plan with another target first (portable, onnxruntime-cuda), then pass "
            "it with --plan.",
        ),
    )

    @classmethod
    def usual(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Healing takes the texts of scoring and of the comparison.

        A model that is a GGUF file is itself the one whose blocks the method gguf keeps.
        """
        results, source = dict(usual_heal(given)), str(given.get("source"))
        if {**results, **given}.get("heal") not in (None, "none"):
            texts = {"heal_calibration": "calibration", "check_text": "other_text"}
            results |= {key: given[text] for key, text in texts.items() if given.get(text)}
        if given.get("quantize_method") == "gguf" and source.endswith(".gguf"):
            results["gguf"] = Path(source)
        return results

    def __post_init__(self) -> None:
        if self.quantize is not None and set(self.quantize.calibration).intersection(SAMPLED):
            # Text that the model samples itself can't be quantised on.
            read = tuple(text for text in self.quantize.calibration if text not in SAMPLED)
            object.__setattr__(self, "quantize", replace(self.quantize, calibration=read))
        if self.drops.budget is not None:
            self.plan_settings.for_budget(self.drops.budget)

    def check(self) -> None:
        """Refuses what contradicts the target, on any machine."""
        from exporter.export.forms.targets import refuse_options

        refuse_options(
            self.target,
            exporter=self.exporter,
            opset=self.opset,
            dtype=self.load.dtype,
            provider=self.compare.provider,
            engine=None if self.engines is None else self.engines.backend,
            cache_length=self.cache_length,
        )
        if self.quantize is not None:
            self.quantize.refuse([self.load.dtype])

    @property
    def plan_settings(self) -> PlanSettings:
        """How the plan is looked for; what is chosen by scores is healed by a stage of its own."""
        return PlanSettings(
            search=self.search,
            heal=self.heal,
            calibration=self.score.calibration,
            batch_size=self.score.batch_size,
            server=self.server,
            allow_all=self.allow_empty,
        )

    @property
    def weighs_replacements(self) -> bool:
        """Whether the plan is chosen together with what makes up for the dropped branches."""
        budget = self.drops.budget
        if budget is None or self.in_stacks:
            return False
        settings = self.plan_settings.for_budget(budget)
        return settings.weighs_replacements or settings.limits_healed(budget)

    @property
    def scored(self) -> bool:
        """Whether sublayers are scored: to choose among them, or for the report."""
        return self.compared or self.drops.plan is None

    @property
    def heals_plan(self) -> bool:
        """Whether replacements are fitted to a plan that was chosen, or given, without them."""
        return self.heal is not None and not self.weighs_replacements

    @property
    def plans_on_graph(self) -> bool:
        """Whether the plan wants the exported graph: its sizes, or the time that it takes."""
        budget = self.drops.budget
        measured = budget is not None and (not budget.only_counts or budget.at is not None)
        return measured or self.weighs_replacements

    @property
    def choosing(self) -> SourceOptions:
        """How the model is loaded that is scored, searched and healed."""
        return replace(self.load, dtype=self.choose_dtype or self.load.dtype)

    @property
    def cache_room(self) -> int | None:
        """Positions of caches of fixed length; None for the usual number, where that will do."""
        if self.cache_length is None and self.compare.longest > USUAL_ROOM:
            return self.compare.longest
        return self.cache_length
