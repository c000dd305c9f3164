"""What TensorRT-RTX makes of one layer of Llama 3 8B, by how its attention and cache are written.

``python -m tests.benchmarks.bench_attention [--write PAGE]``; no GPU is needed, and nothing is run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from exporter.engines.build.build import build_engines
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.build.settings import BuildSettings
from exporter.errors import EngineError
from tests.benchmarks.bench_engines import versions

COMMAND = "make engines"
ROOM = 4096
FORMS = ("opset 20", "opset 23", "opset 23, nothing repeated", "in place")
_SIZES: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 1024,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_RANGES = {
    "decode": Ranges(batch=Span(1, 64, 64), context=Span(1, ROOM - 1, ROOM - 1)),
    "prefill": Ranges(batch=Span(1, 8, 8), prompt=Span(1, 2048, 2048)),
}
_SM89 = BuildSettings(compute_capabilities=("sm89",))
_HEAD = """\
# Attention and caches in engines

Written by `{command}`; don't edit it.
Versions: {versions}.

One layer of Llama 3 8B with constant weights and a vocabulary of 1024, exported by PyTorch and
rewritten, built with TensorRT-RTX for sm89 on a machine without a GPU. Nothing was run.

| column | meaning |
| --- | --- |
| form | how attention and cache are written: basic operators (opset 20), the operator \
Attention on repeated keys and values (opset 23), on those of the cache, and that with a \
cache of {room} positions updated in place (opset 24) |
| phase | decode: batch 64, {context} filled; prefill: batch 8, 2048 tokens |
| scratch MB | what the engine needs beside weights and caches; 10^6 bytes |
| cache MB | that a decoder takes in decode for this layer: two sets of buffers, or one in place |
| real layers | kernels that the builder made, without synchronisation and shapes |

| dtype | form | phase | network layers | real layers | scratch MB | cache MB |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main(arguments: Sequence[str]) -> int:
    """Builds all and prints a line for each engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page to write")
    options = parser.parse_args(arguments)
    lines = []
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
            for line in rows(dtype, Path(folder)):
                print(line, flush=True)
                lines.append(line)
    if options.write:
        from exporter.files import write_text

        told = ", ".join(f"{name} {number}" for name, number in versions().items())
        head = _HEAD.format(command=COMMAND, versions=told, room=ROOM, context=ROOM - 1)
        write_text(options.write, head + "".join(f"{line}\n" for line in lines))
    return 0


def rows(dtype: str, folder: Path) -> Iterator[str]:
    """A table's lines, form by form."""
    loaded = _layer(dtype)
    for form in FORMS:
        onnx = _written(loaded, form, folder / "model")
        for phase in ("decode", "prefill"):
            cells = [dtype, form, phase, *_built(onnx, phase, folder / "engine")]
            cells.append(_cache_mb(dtype, form) if phase == "decode" else "")
            yield f"| {' | '.join(cells)} |"


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
    import onnx_ir as ir

    from exporter.export.forms.tensorrt import rewrite_decoder
    from exporter.export.onnx_output import save_graph
    from exporter.export.torch_export import export_onnx

    path = export_onnx(loaded, folder, opset=20 if form == FORMS[0] else 23)
    if form in FORMS[2:]:
        room = ROOM if form == FORMS[-1] else None
        model, _, remark = rewrite_decoder(ir.load(path), room)
        assert remark is None
        save_graph(model, folder)
    return path


def _built(onnx: Path, phase: str, folder: Path) -> list[str]:
    ranges = fitting(graph_inputs(onnx), _RANGES[phase])
    try:
        ((engine, record),) = build_engines(
            onnx, folder, phases=[phase], ranges=ranges, settings=_SM89
        )
    except EngineError as error:
        return ["", "", error.message]
    engine.unlink()
    scratch = record.memory_bytes["activation"] / 1e6
    return [str(record.network_layers), str(sum(record.layers.values())), f"{scratch:.1f}"]


def _cache_mb(dtype: str, form: str) -> str:
    item = 2 if dtype == "bfloat16" else 4
    one = 2 * 64 * 8 * ROOM * 128 * item
    return f"{one * (1 if form == FORMS[-1] else 2) / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
