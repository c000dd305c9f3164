"""How the sublayers that go are searched for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import AfterValidator

from exporter.choose.selection.options import Objective
from exporter.option_types import Seed, Several, Whole, Written
from exporter.options import Options, Rule, dataclass, is_given, option

DROPPING = "What to drop"
Search = Literal["auto", "one-shot", "greedy"]
OF_TASKS = ("items", "judged_items", "seed")
"""The fields that only the objective ``tasks`` heeds."""
OF_SEARCHES = ("objective", "shortlist", "tokens", *OF_TASKS)
"""The fields that only searches by damage heed."""
_TASKS = "tasks:"
OF_EMBEDDINGS = ("cosine", "similarity")
_OF_TEXTS = ("kl", "perplexity", *OF_EMBEDDINGS)


def _known_objective(value: str) -> str:
    files = value.removeprefix(_TASKS).split(",") if value.startswith(_TASKS) else []
    if value not in _OF_TEXTS and not (files and all(files)):
        raise ValueError(f"it is {', '.join(_OF_TEXTS)} or {_TASKS}FILE.jsonl")
    return value


ObjectiveName = Annotated[
    str,
    AfterValidator(_known_objective),
    Written("kl|perplexity|cosine|similarity|tasks:FILE,FILE"),
]
"""An :data:`Objective`; of tasks with the files of their items."""


def _of_tasks(name: str) -> Rule:
    return Rule(
        (name, "objective"),
        lambda item: is_given(item, name) and not item.task_files,
        "{0} is for {1} tasks:FILE.",
        "Give both, or neither.",
    )


@dataclass(frozen=True)
class SearchOptions(Options):
    """How the sublayers are chosen."""

    search: Search | None = option(
        None,
        "one-shot: drop the lowest scores. greedy: at each step drop what adds the least damage. "
        "auto: greedy if it takes minutes, otherwise one-shot without the first and last layer.",
        usual="plan: one-shot for numbers, otherwise greedy; export: auto",
        brief="auto, one-shot or greedy",
        section=DROPPING,
    )
    objective: ObjectiveName | None = option(
        None,
        "For --search greedy: the damage to minimise: the KL divergence from "
        "the whole model's answers, the perplexity, the loss of the correct answers' "
        "log-probability on the items of FILE.jsonl (several files make a mixture), or 1 minus "
        "the cosine of the embeddings, or 1 minus the correlation of the similarities of pairs of "
        "texts (similarity). kl of a classifier is that of its classes.",
        brief="The damage to minimise",
        usual="kl, for encoders cosine",
        section=DROPPING,
        rare=True,
    )
    protect: tuple[str, ...] = option(
        (),
        "What must not be dropped: first, last, or kind:layers such as attention:0,29; of an "
        "encoder-decoder also encoder or decoder. Repeatable.",
        metavar="WHAT",
        section=DROPPING,
    )
    shortlist: Whole = option(
        12,
        "For --search greedy: candidates to measure at each step; 0 for all.",
        section=DROPPING,
        config_only=True,
    )
    tokens: Several = option(
        4096,
        "For --search greedy: tokens of the calibration text to measure candidates on.",
        "--search-tokens",
        section=DROPPING,
        config_only=True,
    )
    seed: Seed = option(
        0,
        "For --objective tasks: seed of the split of the items.",
        "--search-seed",
        section=DROPPING,
        config_only=True,
    )

    items: Several = option(
        100,
        "For --objective tasks: number of items for the search, at most half of a file.",
        "--search-items",
        section=DROPPING,
        config_only=True,
    )
    judged_items: Several = option(
        400,
        "For --objective tasks: number of other items to evaluate the plan on.",
        section=DROPPING,
        config_only=True,
    )
    rules = tuple(map(_of_tasks, OF_TASKS))

    @property
    def task_files(self) -> tuple[Path, ...]:
        """The files whose items steer the choice; none where texts do."""
        if self.objective is None or not self.objective.startswith(_TASKS):
            return ()
        return tuple(map(Path, self.objective.removeprefix(_TASKS).split(",")))

    @property
    def kept_small(self) -> Objective:
        """The objective without its files; that of next tokens where nothing is said."""
        return cast("Objective", "tasks" if self.task_files else self.objective or "kl")

    def for_model(self, *, embeds: bool) -> SearchOptions:
        """The same with what is kept small named, as it goes with a model."""
        if self.objective is not None or not embeds:
            return self
        return replace(self, objective="cosine")

    @property
    def by_damage(self) -> bool:
        """Whether the damage decides, or may."""
        return self.search in ("auto", "greedy")
