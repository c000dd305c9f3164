"""The table of dialects in Markdown: rows of this environment, beside those of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from tests.dialects.checks import LAYERS, Outcome
from tests.dialects.registry import Dialect

COLUMNS = (
    "dialect", "written by", "opset", "precision", "worst relative error", "note",
)  # fmt: skip
_NOT_RUN = "not run yet"

INTRODUCTION = f"""\
# Dialects

The same tiny random models, {LAYERS} layers each, as different tools write them. This page is
generated: `make dialects` runs every tool in its own environment and replaces its rows.

In each graph every sublayer alone, random sets of them, and all attentions together are cut out;
each result is held against the masked original (the branches multiplied by zero) in ONNX Runtime,
prefill and decode, caches included. A row stands here only if exactly the sublayers that the
model has are found, a wrong cut would show, nothing needless is left in a result, and sums that
were fused with a norm still are. The error is the largest difference over the output's largest
value.
"""


def render(rows: Mapping[str, str], dialects: Iterable[Dialect]) -> str:
    """The whole page."""
    lines = [_line(COLUMNS), _line("---" for _ in COLUMNS)]
    lines += [rows.get(dialect.name) or _absent(dialect) for dialect in dialects]
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def read_rows(page: str) -> dict[str, str]:
    """Dialect to its line in an earlier page; rows that say nothing are left out."""
    lines = [line for line in page.splitlines() if line.count("|") == len(COLUMNS) + 1]
    named = {line.split("|")[1].strip(): line for line in lines[2:]}
    return {name: line for name, line in named.items() if _NOT_RUN not in line}


def row(dialect: Dialect, outcome: Outcome) -> str:
    """The line of a dialect that was run."""
    refused = bool(outcome.reason)
    worst = "exact" if outcome.worst == 0.0 else f"{outcome.worst or 0.0:.1e}"
    note = f"refused: {outcome.reason}" if refused else dialect.note
    cells = ["", note] if refused else [worst, note]
    return _line([
        dialect.name, _versions(dialect), str(outcome.opset), dialect.precision, *cells,
    ])  # fmt: skip


def _absent(dialect: Dialect) -> str:
    cells = [dialect.name, ", ".join(dialect.tools), "", dialect.precision]
    return _line([*cells, *[""] * (len(COLUMNS) - len(cells) - 1), _NOT_RUN])


def _versions(dialect: Dialect) -> str:
    return ", ".join(f"{tool} {_version(tool)}" for tool in dialect.tools)


def _version(distribution: str) -> str:
    for name in (distribution, f"{distribution}-gpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
