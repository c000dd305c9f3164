"""How the sublayers that go are searched for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import AfterValidator

from exporter.choose.selection.options import Objective
from exporter.option_types import Count, DurationOrZero, Seed, Several, Whole, Written
from exporter.options import Options, Rule, dataclass, is_given, option

DROPPING = "What to drop"
Search = Literal["one-shot", "iterative", "greedy", "evolution"]
OF_TASKS = ("items", "judged_items")
"""The fields that only the objective ``tasks`` heeds."""
OF_SEARCHES = ("objective", "shortlist", "tokens", *OF_TASKS)
"""The fields that only searches by damage heed."""
OF_ONE_SEARCH = {"every": "iterative", "seconds": "evolution", "seed": "evolution"}
"""The fields that one search alone heeds, and which; the seed parts the items of tasks, too."""
_TASKS = "tasks:"


def _known_objective(value: str) -> str:
    files = value.removeprefix(_TASKS).split(",") if value.startswith(_TASKS) else []
    if value not in ("kl", "perplexity") and not (files and all(files)):
        raise ValueError(f"it is kl, perplexity or {_TASKS}FILE.jsonl")
    return value


ObjectiveName = Annotated[
    str, AfterValidator(_known_objective), Written("kl|perplexity|tasks:FILE,FILE")
]
"""An :data:`Objective`; of tasks with the files of their items."""


def _of_tasks(name: str) -> Rule:
    return Rule(
        (name, "objective"),
        lambda told: is_given(told, name) and not told.task_files,
        "{0} is for {1} tasks:FILE.",
        "Give both, or neither.",
    )


@dataclass(frozen=True)
class SearchOptions(Options):
    """How the sublayers are chosen.

    Attributes:
        search: None: one-shot for numbers of sublayers, greedy for budgets that are more than that.
    """

    search: Search | None = option(
        None,
        "one-shot: the lowest scores. iterative: scored again after each drop. greedy: the least "
        "added damage at each step. evolution: greedy, then swaps.",
        usual="one-shot for numbers, else greedy",
        brief="one-shot, iterative, greedy or evolution",
        section=DROPPING,
    )
    objective: ObjectiveName = option(
        "kl",
        "Of --search greedy and evolution: the damage that is kept small: the answers' KL "
        "divergence, the perplexity, or what right answers' log-probability against the others "
        "loses in FILE.jsonl; several files make a mixture.",
        brief="The damage that is kept small",
        section=DROPPING,
        rare=True,
    )
    protect: tuple[str, ...] = option(
        (),
        "What must stay: first, last, or kind:layers such as attention:0,29. Repeatable.",
        metavar="WHAT",
        section=DROPPING,
    )
    every: Count = option(
        1,
        "Of --search iterative: drops between two scorings.",
        "--rescore-every",
        section=DROPPING,
        config_only=True,
    )
    shortlist: Whole = option(
        12,
        "Of --search greedy and evolution: candidates that are measured at a step; 0 for all.",
        section=DROPPING,
        config_only=True,
    )
    tokens: Several = option(
        4096,
        "Of --search greedy and evolution: tokens of the calibration text that a choice is "
        "measured on.",
        "--search-tokens",
        section=DROPPING,
        config_only=True,
    )
    seconds: DurationOrZero = option(
        600.0,
        "Of --search evolution: time for swaps.",
        "--search-seconds",
        section=DROPPING,
        rare=True,
    )
    seed: Seed = option(
        0,
        "Of --search evolution: seed of the swaps; of --objective tasks: of the items' parts.",
        "--search-seed",
        section=DROPPING,
        config_only=True,
    )

    items: Several = option(
        100,
        "Of --objective tasks: items that steer the choice, half of a file at most.",
        "--search-items",
        section=DROPPING,
        config_only=True,
    )
    judged_items: Several = option(
        400,
        "Of --objective tasks: items that the plan is judged on, of those that didn't steer.",
        section=DROPPING,
        config_only=True,
    )
    rules = tuple(map(_of_tasks, OF_TASKS))

    @property
    def task_files(self) -> tuple[Path, ...]:
        """The files whose items steer the choice; none where texts do."""
        if not self.objective.startswith(_TASKS):
            return ()
        return tuple(map(Path, self.objective.removeprefix(_TASKS).split(",")))

    @property
    def kept_small(self) -> Objective:
        """The objective without its files."""
        return cast("Objective", "tasks" if self.task_files else self.objective)

    @property
    def by_damage(self) -> bool:
        """Whether the damage decides."""
        return self.search in ("greedy", "evolution")
