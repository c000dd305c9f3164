"""Cuts architectures and holds each cut against PyTorch: ``python -m tests.architectures``.

Finished rows are kept under ``out/`` and taken over by the next run as long as the code and the
libraries are the same.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tests.architectures.catalogue import CATALOGUE, Architecture
from tests.architectures.check import TOLERANCE, Row, WrongModelError, check
from tests.benchmarks.frame import KeptRows, versions
from tests.trials import Cells, Page, run_trials

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxscript")
RANDOM_SETS = 12  # over a thousand in all
PAGE = Page(
    f"""# Architectures

Written by `make architectures`; don't edit it.
Versions: {{versions}}.

Each row is a model with random weights of a few layers, exported and cut by
`graph_passes.prune_graph`: every sublayer alone, all of each kind at once, and up to
{RANDOM_SETS} random sets. Each cut model is run on ONNX Runtime and compared with PyTorch, where
the same modules give zeros, in prefill and decode, with padding; caches and states too. The error
is relative to the largest value; a row holds at {TOLERANCE:.0e} and below, and cutting any
sublayer changes the output by more than a hundred times that. In a post-norm layer the norm
behind the sum stays.

{{summary}}

""",
    ("architecture", "worst relative error", "note"),
    [architecture.name for architecture in CATALOGUE],
)


def summary(rows: list[Row]) -> str:
    """One line over all rows that hold."""
    whole = [row for row in rows if row.cuts]
    return (
        f"{len(whole)} of {len(CATALOGUE)} hold whole; {sum(row.cuts for row in rows)} cut models, "
        f"{sum(row.random_sets for row in rows)} of them random sets, 0 wrong; "
        f"worst relative error {max((row.worst_error for row in whole), default=0.0):.1e}"
    )


def main() -> int:
    """Runs the command; 0 when everything holds."""
    digest = hashlib.sha256()
    sources = [*ROOT.glob("graph_passes/**/*.py"), *Path(__file__).parent.glob("[!t_]*.py")]
    sources.append(Path(__file__).parents[1] / "trials.py")
    for source in sorted(source for source in sources if source.name != "catalogue.py"):
        digest.update(source.read_bytes())
    about = [RANDOM_SETS, versions(*LIBRARIES), digest.hexdigest()]
    kept = KeptRows(ROOT / "out" / "architectures", about)

    def trial(architecture: Architecture, folder: Path) -> list[Cells]:
        name = repr(architecture)
        if (saved := kept.find(name)) is None:
            row = check(architecture, folder, RANDOM_SETS)
            if row.wrong:
                raise WrongModelError("; ".join(row.wrong[:3]))
            saved = kept.keep(name, asdict(row))
        row = Row(**saved)
        return [[architecture.name, f"{row.worst_error:.1e}" if row.cuts else "", row.note]]

    def told() -> Mapping[str, object]:
        rows = [Row(**saved) for item in CATALOGUE if (saved := kept.find(repr(item))) is not None]
        return {"versions": versions(*LIBRARIES), "summary": summary(rows)}

    subjects = {architecture.name: architecture for architecture in CATALOGUE}
    return run_trials(sys.argv[1:], __doc__, PAGE, subjects, trial, told)


if __name__ == "__main__":
    sys.exit(main())
