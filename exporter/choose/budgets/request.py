"""What `depthcut plan` is asked to do. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.choose.budgets.budget import REACHING, Budget
from exporter.choose.budgets.settings import PlanSettings, idle_rule, search_rules, settled_heal
from exporter.choose.selection.search_options import OF_SEARCHES
from exporter.compare.options import SPEED, RunOptions
from exporter.models.loading.options import LOADING, SourceOptions
from exporter.option_types import Duration, InputFile, OnnxFile, OutputPath
from exporter.options import Options, Rule, argument, dataclass, excludes, is_given, option, part
from exporter.score.cluster.options import ClusterOptions
from exporter.score.options import SCORING, MetricName


def _timed(name: str) -> Rule:
    return Rule(
        (name, "onnx", "budget.at"),
        lambda told: is_given(told, name) and not (told.onnx and told.budget.at),
        "{0} is for times that are measured on the exported graph.",
        "Name it with {1} and the request with {2}, or leave this out.",
    )


_OF_MODELS = (
    *("model", "settings.calibration", "settings.batch_size", "load.revision"),
    *("load.trust_remote_code", "load.allow_pickle", "load.allow_any_model_type"),
)


def _running(name: str) -> Rule:
    return Rule(
        (name,),
        lambda told: is_given(told, name) and not told.runs_model,
        "{0} is for plans that run the model; the lowest scores are taken without it.",
        "Leave it out, or take --search, --heal, or a budget that is more than numbers.",
    )


def _of_texts(name: str) -> Rule:
    return Rule(
        (name, "settings.search.objective"),
        lambda told: is_given(told, name) and bool(told.settings.search.task_files),
        "{0} looks at texts, not at {1} tasks:FILE.",
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
        "Write the whole front of what plans gain and cost, and a page with the plot beside it.",
        brief="Write what plans gain and cost, and a plot",
        metavar="FILE.json",
        section=REACHING,
    )
    onnx: OnnxFile | None = option(
        None,
        "The exported graph: requests are timed on it, and sizes read from it.",
        brief="The exported graph, for times and sizes",
        metavar="GRAPH",
        section=SPEED,
    )
    costs: OutputPath | None = option(
        None,
        "Measured costs of sublayers: kept here, and used again for the same graph, request and "
        "machine. Without --onnx they foretell, and nothing is measured.",
        brief="Measured costs of sublayers: used, and kept here",
        metavar="FILE",
        section=SPEED,
    )
    run: RunOptions = part(RunOptions(), rare=("provider", "threads"))
    time_budget_s: Duration = option(
        60.0,
        "Seconds that the rounds of a sublayer's cost may take; those of a candidate twice as "
        "much.",
        "--time-budget",
        section=SPEED,
        rare=True,
    )
    metric: MetricName | None = option(
        None,
        "Which of IMPORTANCE's metrics decides.",
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
            "{0} is for plans of so many sublayers; one for another budget always leaves one.",
            "Leave it out, or plan numbers alone; depthcut heal {0} puts replacements in.",
        ),
        *map(_of_texts, ("cluster", "curve")),
        excludes("cluster", "curve", "a front is made in one process"),
        Rule(
            ("cluster",),
            lambda told: told.cluster is not None and not told.spreads,
            "{0} spreads searches for numbers by damage; other plans are made in one process.",
            "Take --search greedy or evolution and no --heal, or leave {0} out.",
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
        return bool(self.budget.counts or not self.budget.only_counts)

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
