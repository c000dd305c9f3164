"""What `depthcut plan` is asked to do. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.choose.budgets.budget import REACHING, Budget
from exporter.choose.budgets.settings import PlanSettings, idle_rule, search_rules, settled_heal
from exporter.choose.selection.search_options import OF_SEARCHES
from exporter.compare.options import SPEED, RunOptions
from exporter.models.loading.sources import LOADING, SourceOptions
from exporter.option_types import Duration, InputFile, OnnxFile, OutputPath
from exporter.options import Options, Rule, argument, dataclass, excludes, is_given, option, part
from exporter.score.cluster.options import ClusterOptions
from exporter.score.options import SCORING, MetricName


def _timed(name: str) -> Rule:
    return Rule(
        (name, "onnx", "budget.at"),
        lambda told: is_given(told, name) and not (told.onnx and told.budget.at),
        "{0} is for times measured on the exported graph.",
        "Give the graph with {1} and the request with {2}, or leave {0} out.",
    )


_OF_MODELS = (
    *("model", "settings.calibration", "settings.batch_size", "load.revision"),
    *("load.trust_remote_code", "load.allow_pickle", "load.allow_any_model_type"),
)


def _running(name: str) -> Rule:
    return Rule(
        (name,),
        lambda told: is_given(told, name) and not told.runs_model,
        "{0} is for plans that run the model; dropping the lowest scores doesn't run it.",
        "Leave it out, or give --search, --heal, or a budget other than numbers.",
    )


def _of_texts(name: str) -> Rule:
    return Rule(
        (name, "settings.search.objective"),
        lambda told: is_given(told, name) and bool(told.settings.search.task_files),
        "{0} is for searches on text, not for {1} tasks:FILE.",
        "Leave one of them out.",
    )


@dataclass(frozen=True, kw_only=True)
class PlanRequest(Options):
    """What `depthcut plan` is asked to do."""

    importance: InputFile = argument("IMPORTANCE")
    output: OutputPath = option(Path("plan.json"), "The plan.", "-o", "--output")
    budget: Budget = part(Budget())
    settings: PlanSettings = part(
        PlanSettings(), config_only=("seconds",), rare=("batch_size", "protect", "check_text")
    )
    curve: OutputPath | None = option(
        None,
        "Write the Pareto front of gain against damage as JSON, and a page with the plot next "
        "to it.",
        brief="Write gain against damage, and a plot",
        metavar="FILE.json",
        section=REACHING,
    )
    onnx: OnnxFile | None = option(
        None,
        "The exported graph, to time requests and read sizes.",
        brief="The exported graph, for times and sizes",
        metavar="GRAPH",
        section=SPEED,
    )
    costs: OutputPath | None = option(
        None,
        "File for the measured costs of sublayers; they are reused for the same graph, "
        "request and machine. Without --onnx they predict the speed, and nothing is measured.",
        brief="File for the measured costs of sublayers",
        metavar="FILE",
        section=SPEED,
    )
    run: RunOptions = part(RunOptions(), rare=("provider", "threads"))
    time_budget_s: Duration = option(
        60.0,
        "Maximum time to measure the cost of a sublayer, in seconds; a candidate may take "
        "twice as long.",
        "--time-budget",
        section=SPEED,
        rare=True,
    )
    metric: MetricName | None = option(
        None,
        "Which metric of IMPORTANCE to use.",
        metavar="NAME",
        usual="its first",
        section=SCORING,
    )
    model: str | None = option(
        None,
        "The model, for searches that run it.",
        metavar="MODEL",
        usual="as IMPORTANCE",
        section=LOADING,
    )
    load: SourceOptions = part(SourceOptions(), without=("dtype",))
    cluster: ClusterOptions | None = part(switch="address")

    rules = (
        *map(_running, _OF_MODELS),
        *map(_timed, ("run.provider", "run.threads", "time_budget_s")),
        *(
            idle_rule(name, lambda told: told.goes_by_scores)
            for name in (
                *("budget.at", "budget.kinds", "onnx", "costs"),
                *(f"settings.search.{each}" for each in OF_SEARCHES),
            )
        ),
        *search_rules("settings.search"),
        Rule(
            ("settings.allow_all",),
            lambda told: told.settings.allow_all and not told.budget.only_counts,
            "{0} is for plans with a number of sublayers; plans for other budgets always keep one.",
            "Leave it out, or give numbers only; depthcut heal {0} adds replacements.",
        ),
        *map(_of_texts, ("cluster", "curve")),
        excludes("cluster", "curve", "a front is computed in one process"),
        Rule(
            ("cluster",),
            lambda told: told.cluster is not None and not told.spreads,
            "{0} distributes searches by damage for numbers of sublayers; other plans are "
            "made in one process.",
            "Use --search greedy without --heal, or leave {0} out.",
        ),
    )

    def __post_init__(self) -> None:
        if self.curve is None:
            self.budget.refuse_empty()
        self.settings.for_budget(self.budget)

    @classmethod
    def settle(cls, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Budgets that are more than numbers put in what helps, where nothing is said."""
        return settled_heal(told)

    @property
    def wants_plan(self) -> bool:
        """Whether a plan is asked for, and not the front alone."""
        budget = self.budget
        return bool(budget.counts or budget.keep_first or not budget.only_counts)

    @property
    def goes_by_scores(self) -> bool:
        """Whether nothing is measured."""
        by_damage = self.settings.search.by_damage
        return self.budget.only_counts and not by_damage and self.curve is None

    @property
    def runs_model(self) -> bool:
        """Whether the scores alone don't say what is dropped, or something is fitted."""
        settings = self.settings
        iterative = settings.search.search == "iterative"
        return iterative or settings.heal is not None or not self.goes_by_scores

    @property
    def spreads(self) -> bool:
        """Whether the search can be spread over a cluster."""
        damage = self.settings.search.by_damage and self.settings.weighed is None
        return self.budget.only_counts and damage
