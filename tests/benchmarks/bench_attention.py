"""What TensorRT-RTX makes of a layer of Llama 3 8B, by its form, in bfloat16.

``python -m tests.benchmarks.bench_attention``; no GPU is needed, and nothing is run.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.engines.build.build import build_engines
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.build.settings import BuildSettings, Phase
from exporter.errors import EngineError
from tests.benchmarks.frame import print_head, print_machine, print_row

ROOM = 4096
BATCH, PROMPT = 64, 2048
FORMS = ("opset 20", "opset 23", "opset 23, nothing repeated", "in place, mask", "in place")
_SIZES: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 1024,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_RANGES: dict[Phase, Ranges] = {
    "decode": Ranges(batch=Span(1, BATCH, BATCH), context=Span(1, ROOM - 1, ROOM - 1)),
    "prefill": Ranges(batch=Span(1, 8, 8), prompt=Span(1, PROMPT, PROMPT)),
}


def main() -> None:
    """Builds all and prints a line for each engine."""
    print_machine("tensorrt-rtx", "torch")
    print_head("form", "card", "phase", "network layers", "fused", "other kernels", "scratch MB")
    loaded = _layer()
    with tempfile.TemporaryDirectory(prefix="depthcut.") as name:
        for form in FORMS:
            onnx = _written(loaded, form, Path(name) / "model")
            for card, phase in itertools.product(("sm89", "sm120"), _RANGES):
                print_row(form, card, phase, *_built(onnx, form, phase, card, Path(name, "engine")))


def _layer() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.benchmarks.engine_subjects import as_loaded

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for tensor in model.parameters():
        torch.nn.init.constant_(tensor, 0.01)
    model.model.rotary_emb.__init__(config=model.config)
    return as_loaded(model)


def _written(loaded: Any, form: str, folder: Path) -> Path:
    from exporter.export.forms.tensorrt import rewrite_decoder
    from exporter.export.onnx_output import save_graph
    from exporter.export.torch_export import export_onnx

    path = export_onnx(loaded, folder, opset=20 if form == FORMS[0] else 23)
    if form in FORMS[2:]:
        model, _, remark = rewrite_decoder(ir.load(path), ROOM if form in FORMS[3:] else None)
        assert remark is None
        save_graph(model, folder)
    return path


def _built(onnx: Path, form: str, phase: Phase, card: str, folder: Path) -> list[object]:
    ranges = fitting(graph_inputs(onnx), _RANGES[phase])
    settings = BuildSettings(
        compute_capabilities=(card,), cache_reads="filled" if form == FORMS[-1] else "room"
    )
    try:
        ((engine, record),) = build_engines(
            onnx, folder, phases=[phase], ranges=ranges, settings=settings
        )
    except EngineError as error:
        return ["", "", "", error.message]
    engine.unlink()
    fused, scratch = record.layers.get("attention", 0), record.memory_bytes["activation"] / 1e6
    return [record.network_layers, fused, sum(record.layers.values()) - fused, f"{scratch:.1f}"]


if __name__ == "__main__":
    main()
