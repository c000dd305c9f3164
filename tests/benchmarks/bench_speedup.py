"""How much faster SmolLM2 is without 8 and 15 of its 30 attentions, on ONNX Runtime."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from exporter.artifacts import PlannedDeletion
from exporter.compare.options import CompareOptions
from exporter.compare.session import compare
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.report.terminal import comparison_grids, plain_text

# The lowest cosine scores of SmolLM2, lowest first.
ATTENTIONS = (25, 26, 7, 28, 6, 5, 4, 14, 9, 29, 27, 3, 22, 10, 17)
OPTIONS = CompareOptions(prefill_lengths=(128, 512), decode_past_lengths=(512,), eval_tokens=2048)


def main(model: Path) -> None:
    """Prints a table for each cut."""
    for count in (8, 15):
        deletions = [PlannedDeletion(layer=n, kind="attention") for n in ATTENTIONS[:count]]
        with tempfile.TemporaryDirectory(dir=model.parent) as folder:
            candidate = Path(folder) / "model.onnx"
            prune_file(model, candidate, deletions, CutOptions(verify="none"))
            report = compare(model, candidate, OPTIONS, plan=deletions)
            print(plain_text(comparison_grids(report)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
