"""The table of results in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COMMAND = "python -m tests.architectures --write graph_passes/docs/architectures.md"
_COLUMNS = ("architecture", "worst relative error", "note")
_HEAD = """# Architectures

Written by `{command}`; don't edit it.
Versions: {versions}.

Each row is a model with random weights of a few layers, exported and cut by
`graph_passes.prune_graph`: every sublayer alone, all of each kind at once, and up to
{random_sets} random sets. Each cut model is run on ONNX Runtime and compared with PyTorch, where
the same modules give zeros, in prefill and decode, with padding; caches and states too. The error
is relative to the largest value; a row holds at {tolerance:.0e} and below, and cutting any
sublayer changes the output by more than a hundred times that. In a post-norm layer the norm
behind the sum stays.

{summary}

"""


def table(
    rows: Sequence[Row],
    versions: Mapping[str, str],
    random_sets: int,
    tolerance: float,
    summary: str,
) -> str:
    """The whole page."""
    head = _HEAD.format(
        command=COMMAND,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        random_sets=random_sets,
        tolerance=tolerance,
        summary=summary,
    )
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)]
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: Row) -> list[str]:
    error = f"{row.worst_error:.1e}" if row.cuts else ""
    if not row.holds:
        error = f"**{error or 'fails'}**"
    note = row.note if row.holds else " ".join([row.failed, *row.wrong[:1]]).strip()
    cells = [row.name, error, note]
    return [cell.replace("|", "\\|") for cell in cells]


TOLERANCE = 1e-5
"""Relative to the largest logit, and in caches to the largest entry of any."""
COUNTS = 100 * TOLERANCE
"""How much every sublayer must matter, or a wrong cut of it would pass."""


@dataclass
class Row:
    """What was seen of one architecture."""

    name: str
    model_class: str = ""
    graph: str = ""
    form: str = ""
    exporter: str = ""
    layers: int = 0
    sites: dict[str, int] = field(default_factory=dict)
    cuts: int = 0
    random_sets: int = 0
    cuts_refused: int = 0
    worst_error: float = 0.0
    uncut_error: float = 0.0
    weakest: float = 0.0
    wrong: list[str] = field(default_factory=list)
    refused: str = ""
    not_exported: str = ""
    failed: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether everything was as it must be."""
        return not self.wrong and not self.failed

    @property
    def note(self) -> str:
        """What else there is to say."""
        if self.refused:
            return f"refused: {self.refused}"
        if self.not_exported:
            return f"not exported: {self.not_exported}"
        if self.cuts_refused:
            return f"{self.cuts_refused} more refused: no input that is left has the past length"
        return ""
