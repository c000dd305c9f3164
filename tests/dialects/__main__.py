"""Cuts what each exporter writes, of those that are installed: ``python -m tests.dialects``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.benchmarks.frame import versions
from tests.dialects.checks import LAYERS, Outcome, check
from tests.dialects.registry import DIALECTS, Dialect, Workshop
from tests.trials import Cells, Page, run_trials

PAGE = Page(
    f"""\
# Dialects

The same tiny random models, {LAYERS} layers each, as different tools write them. This page is
generated: `make dialects` runs every tool in its own environment and replaces its rows.

In each graph every sublayer alone, random sets of them, and all attentions together are cut out;
each result is held against the masked original (the branches multiplied by zero) in ONNX Runtime,
prefill and decode, caches included. A row stands here only if exactly the sublayers that the
model has are found, a wrong cut would show, nothing needless is left in a result, and sums that
were fused with a norm still are. The error is the largest difference over the output's largest
value.

""",
    ("dialect", "written by", "opset", "precision", "worst relative error", "note"),
    [dialect.name for dialect in DIALECTS],
)


def row(dialect: Dialect, outcome: Outcome) -> Cells:
    """The line of a dialect that was run."""
    error = "exact" if outcome.worst == 0.0 else f"{outcome.worst:.1e}"
    cells = [error, dialect.note]
    if outcome.reason:
        cells = ["", f"refused: {outcome.reason}"]
    tools = versions(*dialect.tools)
    return [dialect.name, tools, str(outcome.opset), dialect.precision, *cells]


def main() -> int:
    """Runs the chosen dialects; rows of tools that are not installed here stay."""
    for dialect in DIALECTS:
        if dialect.missing:
            print(f"left out, {dialect.missing} is not installed: {dialect.name}")
    there = {dialect.name: dialect for dialect in DIALECTS if not dialect.missing}
    with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
        shop = Workshop(Path(folder))

        def trial(dialect: Dialect, _folder: Path) -> list[Cells]:
            return [row(dialect, check(dialect, shop))]

        return run_trials(sys.argv[1:], __doc__, PAGE, there, trial)


if __name__ == "__main__":
    sys.exit(main())
