"""The table of dialects in Markdown: rows of this environment, beside those of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

from tests.dialects.checks import LAYERS, Outcome
from tests.dialects.registry import Dialect

COLUMNS = (
    "dialect", "written by", "opset", "precision", "nodes", "sites", "cuts", "worst relative error",
    "fused sums", "onnx's full check", "nodes in ONNX Runtime", "note",
)  # fmt: skip
_NOT_RUN = "not run yet"

INTRODUCTION = f"""\
# Dialects

The same tiny random models, {LAYERS} layers each, as different tools write them. This page is
generated: `make dialects` runs every tool in its own environment and replaces its rows.

In each graph every sublayer alone, random sets of them, and all attentions together are cut out;
each result is held against the masked original (the branches multiplied by zero) in ONNX Runtime,
prefill and decode, all outputs, the caches included. A row stands here only if

- exactly the sublayers that the model has are found, of the right kind and layer;
- masking a single sublayer changes an output by more than a thousandth, so that a wrong cut shows;
- nothing is left in a result that nothing needs, and onnx's full check with shape inference takes
  the result where it takes the original (ONNX Runtime's own names for norms aside);
- every residual sum that was fused with a norm and still has its two operands is still fused.

| column | meaning |
| --- | --- |
| sites | sublayers found; 0 where the graph is refused |
| cuts | sets of sublayers that were cut out and compared |
| worst relative error | over all cuts, runs and outputs: largest difference / the output's largest value |
| fused sums | sums that are one operator with the norm behind them: in the original, and after one cut |
| onnx's full check | whether it takes the original; results pass where it does |
| nodes in ONNX Runtime | after its own optimisation: with one block cut out, and as the tool writes a model with one layer less; a post-norm encoder keeps the two norms of its block |
"""  # noqa: E501


def render(rows: Mapping[str, str], dialects: Iterable[Dialect]) -> str:
    """The whole page.

    Args:
        rows: Dialect to its line, of this run or an earlier one.
        dialects: All dialects, in order; those without a row are marked.
    """
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
    fused = f"{outcome.fused}, {outcome.fused - 1}" if outcome.fused else "none"
    nodes = "{}, {}".format(*outcome.runtime_nodes) if outcome.runtime_nodes else "not compared"
    note = f"refused: {outcome.reason}" if refused else dialect.note
    valid = "passes" if outcome.valid else "fails on the original"
    judged = [""] * 4 if refused else [worst, fused, valid, nodes]
    return _line([
        dialect.name, _versions(dialect), str(outcome.opset), dialect.precision,
        str(outcome.nodes), str(outcome.sites), str(outcome.cuts), *judged, note,
    ])  # fmt: skip


def _absent(dialect: Dialect) -> str:
    cells = [dialect.name, ", ".join(dialect.tools), "", dialect.precision]
    return _line([*cells, *[""] * (len(COLUMNS) - len(cells) - 1), _NOT_RUN])


def _versions(dialect: Dialect) -> str:
    """The tools' versions, and the runtime's that judged."""
    tools = dict.fromkeys([*dialect.tools, "onnxruntime"])
    return ", ".join(f"{tool} {_version(tool)}" for tool in tools)


def _version(distribution: str) -> str:
    for name in (distribution, f"{distribution}-gpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
