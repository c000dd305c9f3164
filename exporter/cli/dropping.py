"""What is to be dropped, by a plan or by hand: for the commands that cut a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.option_types import InputFile
from exporter.options import Options, Rule, dataclass, option

if TYPE_CHECKING:
    from exporter.artifacts.loaded_plan import LoadedPlan


@dataclass(frozen=True)
class DropOptions(Options):
    """A plan's file, or a list."""

    plan: InputFile | None = option(None, "Drop what this plan.json lists.")
    drop: tuple[str, ...] = option(
        (),
        "Drop these, such as attention:25,26 or mlp:3 or block:10-12. Repeatable.",
        metavar="KIND:LAYERS",
    )
    rules = (
        Rule(
            ("plan", "drop"),
            lambda told: (told.plan is None) == (not told.drop),
            "Say what to drop:",
            "Give either {0} FILE or {1} KIND:LAYERS.",
        ),
    )

    def read(self) -> LoadedPlan:
        """The plan with its numbers."""
        from exporter.artifacts.loaded_plan import LoadedPlan
        from exporter.artifacts.plans import parse_drops

        return (
            LoadedPlan(parse_drops(self.drop)) if self.plan is None else LoadedPlan.read(self.plan)
        )
