"""Writes the golden graphs anew: ``python tests/golden/regenerate.py``. Read the diff."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from graph_passes import Deletion, prune_graph
from tests.tiny_graphs import TinySpec, tiny_model

FOLDER = Path(__file__).parent
CASES = {
    "pre_norm_attention_0": (TinySpec(layers=2), [Deletion(0, "attention")]),
    "post_norm_block_0": (
        TinySpec(form="post_norm", cache=False, layers=2), [Deletion(0, "block")],
    ),
}  # fmt: skip


def golden_texts() -> Iterator[tuple[Path, str]]:
    """For each case its file and what it should hold."""
    for name, (spec, deletions) in CASES.items():
        pruned, _ = prune_graph(tiny_model(spec), deletions)
        text = ir.to_onnx_text(pruned, exclude_initializers=True)
        yield FOLDER / f"{name}.txt", text.rstrip() + "\n"


if __name__ == "__main__":
    for path, text in golden_texts():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
