"""How a plan is looked for: by which search, with which replacements, on which text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.artifacts.servers import Server
from exporter.choose.budgets.budget import (
    DROPPING,
    OF_SEARCHES,
    Budget,
    SearchOptions,
    asks_for_more_than_numbers,
)
from exporter.compare.options import SPEED, RunOptions
from exporter.errors import UsageError
from exporter.heal.options import HealOptions
from exporter.models.loading.sources import LOADING, SourceOptions
from exporter.option_types import Count, Duration, InputFile, OnnxFile, OutputPath
from exporter.options import Options, Rule, argument, dataclass, idle, option, part
from exporter.score.options import NAMED_ONCE, SCORING, MetricName


@dataclass(frozen=True)
class PlanSettings(Options):
    """How a plan is looked for."""

    section = SCORING
    config_only = ("time", "check_text")
    search: SearchOptions = part(SearchOptions())
    calibration: tuple[str, ...] = option(
        (),
        "Text to search on: a file or folder of text, hf:DATASET, pydoc, or self. Several make a "
        "mixture.",
        metavar="SOURCE",
        usual="the text that IMPORTANCE was measured on",
    )
    batch_size: Count = option(4, "Samples in one forward pass.", config_only=True)
    server: Server | None = option(
        None,
        "The runtime that the plan is for: what it can't do without stays, and only replacements "
        "that it can hold are fitted.",
        "--for",
        usual="any",
        section=DROPPING,
    )
    allow_all: bool = option(
        False,
        "For numbers only: drop them even if no attention and no MLP is left. Disables no "
        "other check.",
        "--allow-empty",
        section=DROPPING,
    )

    heal: HealOptions | None = part(
        None, without=("calibration", "samples", "sequence_length", "seed")
    )
    rules = (NAMED_ONCE,)

    def for_budget(self, budget: Budget) -> PlanSettings:
        """The same with the method named, as it goes with a budget.

        Numbers of sublayers are chosen by their scores where nothing is said, anything else
        greedily.
        """
        if budget.keep_first is not None:
            if self.search.search not in (None, "auto", "one-shot"):
                raise UsageError(
                    f"--keep-first says what is dropped, so there is nothing for --search "
                    f"{self.search.search} to choose.",
                    "Leave one of them out.",
                    code="options-clash",
                )
            return replace(self, search=replace(self.search, search="one-shot"))
        method = self.search.search or ("one-shot" if budget.only_counts else "greedy")
        search = replace(self.search, search=method)
        if not budget.only_counts and not search.by_damage:
            raise UsageError(
                f"Budgets need a search that measures damage; --search {method} does not.",
                "Leave --search out, or use greedy.",
                code="options-clash",
            )
        fits = self.heal if search.by_damage else None
        own_text = fits is not None and fits.calibration not in ((), self.calibration)
        if fits is not None and own_text and not fits.changes_weights:
            raise UsageError(
                "A search by damage fits replacements itself, on the text that it searches on.",
                "Of the healing options give only --heal and check_text, or "
                "make the plan first and heal it: depthcut heal.",
            )
        return replace(self, search=search)

    @property
    def weighs_replacements(self) -> bool:
        """Whether the search chooses sublayers and their replacements together."""
        return self.weighed is not None

    @property
    def weighed(self) -> HealOptions | None:
        """How a search weighs replacements; None where it chooses among bare cuts."""
        heal = self.heal
        if heal is None or not self.search.by_damage:
            return None
        if heal.trains and heal.replacements != "none":
            return HealOptions(kind=heal.replacements)
        return None if heal.changes_weights else heal

    @property
    def heals_afterwards(self) -> bool:
        """Whether what was chosen is healed then: by fits, or by a training."""
        return self.heal is not None and self.weighed is not self.heal

    def limits_healed(self, budget: Budget) -> bool:
        """Whether limits on quality are those of a cut whose weights were healed."""
        return bool(budget.floors) and self.heal is not None and self.heal.changes_weights

    def told(self) -> dict[str, int | float | str]:
        """What a plan notes of it, beside what was asked for."""
        search = self.search
        if search.search == "one-shot" and not search.protect and self.server is None:
            return {}
        numbers: dict[str, int | float | str | None] = {
            "search": search.search,
            "objective": search.kept_small if search.by_damage else None,
            "heal": None if self.weighed is None else self.weighed.kind,
            "protect": ", ".join(search.protect) or None,
            "for": self.server,
        }
        return {name: value for name, value in numbers.items() if value is not None}


def idle_rule(name: str, by_scores: Callable[[Any], bool]) -> Rule:
    """Refuses an option that a choice by scores alone has no use for."""
    words = "{0} is for searches by damage, and for budgets other than numbers."
    return idle((name,), by_scores, words, "Give such a budget: --faster 1.2x or --parameters 10%.")


def usual_heal(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What takes the places where nothing is said: numbers alone are the paper's way."""
    return {"heal": "best"} if asks_for_more_than_numbers(given) else {}


@dataclass(frozen=True, kw_only=True)
class PlanRequest(Options):
    """What `depthcut plan` is asked to do."""

    rare = ("protect", "provider", "threads")
    importance: InputFile = argument("IMPORTANCE")
    output: OutputPath = option(Path("plan.json"), "The plan.", "-o", "--output")
    budget: Budget = part(Budget())
    settings: PlanSettings = part(PlanSettings())
    onnx: OnnxFile | None = option(
        None,
        "The exported graph, to time requests and read sizes.",
        metavar="GRAPH",
        section=SPEED,
    )
    costs: InputFile | None = option(
        None,
        "Costs of sublayers, of depthcut costs; without --onnx no speed is measured beside them.",
        metavar="FILE",
        section=SPEED,
        config_only=True,
    )
    run: RunOptions = part(RunOptions())
    time_budget_s: Duration = option(
        60.0,
        "Half of the maximum time to measure a candidate for --faster, in seconds.",
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

    rules = (
        *(
            idle(
                (name, "onnx", "budget.at"),
                lambda given: not (given.onnx and given.budget.at),
                "{0} is for times measured on the exported graph.",
                "Give the graph with {1} and the request with {2}, or leave {0} out.",
            )
            for name in ("run.provider", "run.threads", "time_budget_s")
        ),
        *(
            idle_rule(name, lambda given: given.goes_by_scores)
            for name in (
                *("budget.at", "budget.kinds", "onnx", "costs"),
                *(f"settings.search.{field}" for field in OF_SEARCHES),
            )
        ),
        Rule(
            ("settings.allow_all",),
            lambda given: given.settings.allow_all and not given.budget.only_counts,
            "{0} is for plans with a number of sublayers; plans for other budgets always keep one.",
            "Leave it out, or give numbers only; depthcut heal {0} adds replacements.",
        ),
    )

    def __post_init__(self) -> None:
        self.budget.refuse_empty()
        self.settings.for_budget(self.budget)

    @classmethod
    def usual(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Budgets that are more than numbers put in what helps."""
        return usual_heal(given)

    @property
    def goes_by_scores(self) -> bool:
        """Whether nothing is measured."""
        return self.budget.only_counts and not self.settings.search.by_damage
