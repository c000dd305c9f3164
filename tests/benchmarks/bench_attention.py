"""What TensorRT-RTX makes of an attention of Llama 3 8B, and of one of its layers, by their form.

``python -m tests.benchmarks.bench_attention``; no GPU is needed, and nothing is run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.engines.build.build import adapt, build_engines, read_graph
from exporter.engines.build.logs import LayerTable, read_layers
from exporter.engines.build.network import Builder, builder_config
from exporter.engines.build.profiles import (
    NamedSpan,
    Ranges,
    Span,
    fitting,
    graph_inputs,
    profile,
)
from exporter.engines.build.settings import BuildSettings, Phase
from exporter.errors import EngineError
from exporter.optional import require
from tests.attention_alone import attention_in_place

ROOM = 4096
BATCH, PROMPT = 64, 2048
FORMS = ("opset 20", "opset 23", "opset 23, nothing repeated", "in place, mask", "in place")
PHASES: tuple[Phase, ...] = ("decode", "prefill")
_SIZES: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 1024,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_RANGES = {
    "decode": Ranges(batch=Span(1, BATCH, BATCH), context=Span(1, ROOM - 1, ROOM - 1)),
    "prefill": Ranges(batch=Span(1, 8, 8), prompt=Span(1, PROMPT, PROMPT)),
}
_CAUSAL = {"lengths, UPPER_LEFT": "UPPER_LEFT", "lengths, LOWER_RIGHT": "LOWER_RIGHT"}


def main(arguments: Sequence[str]) -> int:
    """Builds all and prints a line for each engine."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    _print(attention_rows())
    for dtype, *cards in (("bfloat16", "sm89", "sm120"), ("float32", "sm89")):
        with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
            _print(layer_rows(dtype, cards, Path(folder)))
    return 0


def _print(rows: Iterator[Sequence[str]]) -> None:
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)


def attention_rows() -> Iterator[Sequence[str]]:
    """The cells of each line of the table of one attention."""
    for card, dtype in (("sm89", "bfloat16"), ("sm89", "float16"), ("sm120", "bfloat16")):
        for phase in PHASES:
            for told_by in ("mask", *(_CAUSAL if phase == "prefill" else ()), "depthcut build"):
                name, table = _attention(dtype, card, phase, told_by)
                scratch = table.memory_bytes.get("activation", 0) / 1e6
                yield card, dtype, phase, name, f"{scratch:.1f}", *_kernels(table.layers)


def _attention(dtype: str, card: str, phase: Phase, told_by: str) -> tuple[str, LayerTable]:
    """What an attention is told by, and the layers that are made of it."""
    trt = require("tensorrt_rtx", extra="rtx")
    settings = BuildSettings(
        compute_capabilities=(card,), cache_reads="room" if told_by == "mask" else "filled"
    )
    model = attention_in_place(dtype, heads=32, kv_heads=8, size=128, room=ROOM)
    builder = Builder(trt)
    with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
        path = Path(folder) / "m.onnx"
        ir.save(model, path)
        # Lengths are what a decode step is told; here several tokens are told them.
        phases: list[Phase] = ["decode" if told_by in _CAUSAL else phase]
        made = adapt(read_graph(path), settings, phases, has_lengths=True)
        parsed = builder.parse(path, made.write(Path(folder) / "graph.onnx"), made.lengths)
        new = Span(1, PROMPT, PROMPT) if phase == "prefill" else Span(1, 1, 1)
        ranges = Ranges(batch=Span(1, BATCH, BATCH), dims=(NamedSpan("sequence", new),))
        shapes = profile(graph_inputs(path), phase, ranges)
    assert made.attention is not None
    if told_by in _CAUSAL:
        _set_causal(parsed.network, trt, _CAUSAL[told_by])
    config = builder_config(builder, settings, [shapes], None)
    assert builder.builder.build_serialized_network(parsed.network, config) is not None
    name = told_by if told_by in _CAUSAL else made.attention.told_by
    return name, read_layers(builder.listener.messages())


def _set_causal(network: Any, trt: Any, kind: str) -> None:
    layers = (network.get_layer(number) for number in range(network.num_layers))
    for layer in layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.causal_kind = getattr(trt.CausalMaskKind, kind)


def _kernels(layers: Mapping[str, int]) -> tuple[str, str]:
    """How many do an attention as a whole, and how many others there are."""
    fused = layers.get("attention", 0)
    return str(fused), str(sum(layers.values()) - fused)


def layer_rows(dtype: str, cards: Sequence[str], folder: Path) -> Iterator[Sequence[str]]:
    """The cells of each line of the table of one layer, form by form."""
    loaded = _layer(dtype)
    for form in FORMS:
        onnx = _written(loaded, form, folder / "model")
        for card, phase in itertools.product(cards, PHASES):
            found = _built(onnx, form, phase, card, folder / "engine")
            cache = _cache_mb(dtype, form) if phase == "decode" else ""
            yield [card, dtype, form, phase, *found, cache]


def _layer(dtype: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.benchmarks.engine_subjects import as_loaded

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu")
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
        room = ROOM if _in_place(form) else None
        model, _, remark = rewrite_decoder(ir.load(path), room)
        assert remark is None
        save_graph(model, folder)
    return path


def _in_place(form: str) -> bool:
    return form.startswith("in place")


def _built(onnx: Path, form: str, phase: Phase, card: str, folder: Path) -> list[str]:
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
    scratch = record.memory_bytes["activation"] / 1e6
    return [str(record.network_layers), *_kernels(record.layers), f"{scratch:.1f}"]


def _cache_mb(dtype: str, form: str) -> str:
    item = 2 if dtype == "bfloat16" else 4
    one = 2 * BATCH * 8 * ROOM * 128 * item
    return f"{one * (1 if _in_place(form) else 2) / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
