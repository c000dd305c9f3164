"""Which attentions a row of the healing benchmark drops; what was searched is kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.files import write_text
from tests.benchmarks.healing_rows import Row

if TYPE_CHECKING:
    from exporter.choose.selection.options import Objective, Option

BATCH, SEARCH_SAMPLES, SHORTLIST = 2, 4, 8


class Choices:
    """Chooses a row's attentions."""

    def __init__(
        self,
        model: Any,
        order: Sequence[int],
        text_of: Callable[[Row], Any],
        fits_of: Callable[[Row], Mapping[Any, Any]],
        prefix: Path,
    ) -> None:
        self._model, self._order = model, order
        self._text_of, self._fits_of, self._prefix = text_of, fits_of, prefix

    def of(self, row: Row) -> list[Any]:
        """The names of the attentions that a row drops."""
        if row.choice == "cosine":
            return [(layer, "attention") for layer in self._order[: row.dropped]]
        steps = self._searched(row, row.choice)
        return [name for step in steps[: row.dropped] for name in step]

    def _searched(self, row: Row, objective: Objective) -> list[list[Any]]:
        """The names of each step of a greedy search with the maps in place; kept on disk."""
        from exporter.choose.selection.greedy import greedy

        def search() -> list[list[Any]]:
            prior = {(layer, "attention"): float(n) for n, layer in enumerate(self._order)}
            steps = greedy(
                self._search_meter(row), self._search_options(row),
                goal=15, objective=objective, shortlist=SHORTLIST, prior=prior,
            )  # fmt: skip
            return [list(step.option.names) for step in steps]

        about = "-".join([row.fitted, *row.sources, str(row.samples), objective])
        return self._kept(f"search-{about}", search)

    def _kept(self, name: str, search: Callable[[], list[list[Any]]]) -> list[list[Any]]:
        path = Path(f"{self._prefix}-{name}.json")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(search()) + "\n")
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [[(layer, kind) for layer, kind in step] for step in kept]

    def _search_options(self, row: Row) -> list[Option]:
        """Each attention with what takes its place."""
        from exporter.choose.selection.options import Option

        fits = self._fits_of(row)
        places = {name: getattr(fit, row.fitted) for name, fit in fits.items()}
        return [Option((n,), 1.0, row.fitted, {n: place}) for n, place in places.items()]

    def _search_meter(self, row: Row) -> Any:
        from exporter.models.ablation.meter import DamageMeter

        text = self._text_of(row)
        return DamageMeter(
            self._model, text.input_ids[:SEARCH_SAMPLES], text.mask[:SEARCH_SAMPLES],
            batch_size=BATCH, positions=2,
        )  # fmt: skip
