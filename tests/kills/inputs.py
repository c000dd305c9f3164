"""What commands are given: models, plans and texts of a few kilobytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.kills.scenarios import SCENARIOS, SCORING

_SWEEP = """\
models: [llama]
plans: [{plans}]
precisions: [fp32]
shapes: {{prefill: [8], decode_past: [8]}}
scoring: {{calibration: text.txt, samples: 2, sequence_length: 16, batch_size: 2}}
measuring:
  {{rounds: 2, eval_text: other.txt, eval_tokens: 32, eval_sequence_length: 16, threads: 1,
   agreement_prompts: 0}}
"""


def write_inputs(folder: Path, names: Sequence[str]) -> None:
    """Makes what the scenarios of these names are given, without any command of depthcut."""
    from tests.exporter.tiny_lm import WORDS, write_llama_folder, write_tokenizer

    folder.mkdir(parents=True)
    words = [WORDS[(7 * n + n // 5) % len(WORDS)] for n in range(600)]
    (folder / "text.txt").write_text(" ".join(words[:400]), encoding="utf-8")
    (folder / "other.txt").write_text(" ".join(words[150:][::-1]), encoding="utf-8")
    (folder / "search.yaml").write_text("search_tokens: 32\nshortlist: 3\n", encoding="utf-8")
    (folder / "budget.yaml").write_text("check_text: in/other.txt\n", encoding="utf-8")
    _write_graphs(folder)
    write_tokenizer(folder / "whole")
    _write_engine(folder / "engine")
    if any("torch" in SCENARIOS[name].needs for name in names):
        write_llama_folder(folder / "llama")
        _write_plans(folder)
    for name, plans in {"one": "attention:1", "two": "attention:1, mlp:1"}.items():
        (folder / f"{name}.yaml").write_text(_SWEEP.format(plans=plans), encoding="utf-8")


def _write_graphs(folder: Path) -> None:
    import onnx_ir as ir

    from graph_passes import save_model
    from tests.llama_shaped import LlamaShape, write_llama
    from tests.tiny_graphs import TinySpec, tiny_model

    for name, layers in {"whole": 3, "cut": 2}.items():
        shape = LlamaShape(
            layers=layers, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=64,
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        (folder / name).mkdir()
        write_llama(folder / name / "model.onnx", shape, noise=0.1)
    save_model(tiny_model(TinySpec(layers=2)), folder / "tiny.onnx")
    for name, layers in {"encoder": 3, "encoder-cut": 2}.items():
        (folder / name).mkdir()
        encoder = tiny_model(TinySpec(layers=layers, cache=False))
        file = folder / name / "model.onnx"
        ir.save(encoder, file, external_data="model.onnx.data", size_threshold_bytes=0)


def _write_engine(folder: Path) -> None:
    from tests.engine_support import written

    folder.mkdir()
    written(folder)


def _write_plans(folder: Path) -> None:
    from exporter.artifacts.plans import parse_drops
    from exporter.cli import run

    here = Path.cwd()
    os.chdir(folder.parent)
    try:
        asked = ("score", "in/llama", "-o", "in/importance.json", *SCORING, "--samples", "16", "-q")
        assert run(asked) == 0
    finally:
        os.chdir(here)
    for name, drops in {
        "plan": ["attention:1"],
        "blocks": ["block:1"],
        "wide": ["attention:0", "mlp:2"],
    }.items():
        parse_drops(drops).write(folder / f"{name}.json")


def once_exported(folder: Path) -> None:
    """Traces each model once, however often it is exported, and gives the same each time."""
    import torch

    from tests.exports_once import ExportsOnce

    class Kept(ExportsOnce):
        def __call__(self, model: Any, *arguments: Any, **options: Any) -> Any:
            super().__call__(model, *arguments, **options)
            return super().__call__(model, *arguments, **options)  # what is kept differs in form

    folder.mkdir(exist_ok=True)
    torch.onnx.export = Kept(torch.onnx.export, folder)
