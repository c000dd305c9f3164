"""What commands are given where they are killed or watched: models of a few kilobytes, and more."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx_ir as ir

SCORING = "--calibration in/text.txt --samples 2 --sequence-length 16"
TIMING = (
    "--prefill 8 --decode-past 8 --rounds 2 --threads 1"
    " --eval-text in/other.txt --eval-tokens 32 --config in/few.yaml"
)
_SETTINGS = {
    "few": "agreement_prompts: 0", "short": "eval_sequence_length: 16",
    "search": "search_tokens: 32\nshortlist: 3", "build": "optimization_level: 0",
    "budget": "check_text: in/other.txt", "any": "allow_any_model_type: true",
}  # fmt: skip
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


def write_inputs(folder: Path) -> None:
    """Fills the folder ``in`` of the working directory; without PyTorch, what needs none."""
    from tests.engine_support import written
    from tests.llama_shaped import LlamaShape, write_llama
    from tests.text_graphs import WORDS, write_tokenizer
    from tests.tiny_graphs import TinySpec, tiny_model

    words = [WORDS[(7 * n + n // 5) % len(WORDS)] for n in range(600)]
    for name in ("whole", "cut", "encoder", "encoder-cut", "tiny", "engine"):
        (folder / name).mkdir(parents=True)
    (folder / "text.txt").write_text(" ".join(words[:400]), encoding="utf-8")
    (folder / "other.txt").write_text(" ".join(words[150:][::-1]), encoding="utf-8")
    settings = {**_SETTINGS, "one": _SWEEP.format(plans="attention:1")}
    settings["two"] = _SWEEP.format(plans="attention:1, mlp:1")
    for name, text in settings.items():
        (folder / f"{name}.yaml").write_text(f"{text}\n", encoding="utf-8")
    for name, layers in {"whole": 3, "cut": 2}.items():
        shape = LlamaShape(
            layers=layers, hidden=32, heads=4, kv_heads=2, intermediate=48, vocabulary=64,
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        write_llama(folder / name / "model.onnx", shape, noise=0.1)
    graphs = {"encoder": (3, False), "encoder-cut": (2, False), "tiny": (2, True)}
    for name, (layers, cache) in graphs.items():
        model, file = tiny_model(TinySpec(layers=layers, cache=cache)), folder / name / "model.onnx"
        ir.save(model, file, external_data="model.onnx.data", size_threshold_bytes=0)
    write_tokenizer(folder / "whole")
    written(folder / "engine")
    if importlib.util.find_spec("torch"):
        _write_llama(folder)


def _write_llama(folder: Path) -> None:
    """A model in PyTorch, its scores, and plans."""
    from exporter.artifacts.plans import parse_drops
    from tests.forked import depthcut
    from tests.text_graphs import write_llama_folder

    write_llama_folder(folder / "llama")
    if depthcut(f"score in/llama -o in/importance.json {SCORING} --samples 16 -q"):
        raise RuntimeError("the sound model can't be scored")
    plans = {"plan": ["attention:1"], "blocks": ["block:1"], "wide": ["attention:0", "mlp:2"]}
    for name, drops in plans.items():
        parse_drops(drops).write(folder / f"{name}.json")
