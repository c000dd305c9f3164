"""The table of results in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.architectures.rows import Row

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
