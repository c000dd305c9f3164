"""How each tool writes the tiny models: into a folder, of a depth or of another tool's graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_models import family_loaded, tiny_tokenizer

HEADS, HIDDEN = 4, 64
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 0, "vocab_size": 96, "hidden_size": HIDDEN},
    "bert": {"num_hidden_layers": 0, "hidden_size": HIDDEN},
    "gpt2": {"n_layer": 0},
    "gemma2": {"num_hidden_layers": 0, "vocab_size": 96, "hidden_size": HIDDEN, "head_dim": 16}
    | {"sliding_window": 8},
}


def loaded(family: str, layers: int, *, dtype: str = "float32", **more: Any) -> Any:
    """A model of a family, as the loader gives it."""
    changes = {k: layers if "layer" in k else v for k, v in _SIZES[family].items()}
    made = family_loaded(family, dtype=dtype, initializer_range=0.2, **changes, **more)
    for name, weight in made.model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide whose bias goes where
            weight.normal_(std=0.1)
    return made


def dynamo(
    folder: Path, layers: int, *, family: str = "llama", opset: int = 20, dtype: str = "float32"
) -> Path:
    """PyTorch's exporter as depthcut calls it."""
    from exporter.export.torch_export import export_onnx

    return export_onnx(loaded(family, layers, dtype=dtype), folder, opset=opset)


def torchscript(folder: Path, layers: int, *, family: str, opset: int = 14) -> Path:
    """PyTorch's old exporter, mask and positions given."""
    import torch

    from exporter.models.onnx_interface import interface_of
    from tests.architectures.graphs import part_of_interface, token_inputs

    model = loaded(family, layers, attn_implementation="eager").model
    interface = interface_of(model)
    ids = mask = torch.ones(2, 8, dtype=torch.long)
    new = slice(5 if interface.cache else 0, 8)
    past = dict(zip(interface.past_names, interface.random_past(2, 5), strict=True))
    example = token_inputs(interface, ids, mask, new) | past
    part = part_of_interface(model, interface, example)
    axes = {}
    for name in (*example, *part.outputs):
        axes[name] = {0: "batch", 1: "sequence"}
        if name.startswith(("past", "present")):
            axes[name] = {0: "batch", 2: "past" if name.startswith("past") else "total"}
        elif name == "attention_mask":
            axes[name] = {0: "batch", 1: "total"}
    torch.onnx.export(
        part.module(flat=True), tuple(example.values()), str(folder / "model.onnx"), dynamo=False,
        opset_version=opset, input_names=[*example], output_names=part.outputs, dynamic_axes=axes,
    )  # fmt: skip
    return folder / "model.onnx"


def transformers_exporter(folder: Path, layers: int) -> Path:
    """transformers' own exporter: ``OnnxExporter``."""
    import torch
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = loaded("llama", layers).model
    past = DynamicCache(config=model.config)
    model(input_ids=torch.ones(2, 5, dtype=torch.long), past_key_values=past, use_cache=True)
    inputs = {
        "input_ids": torch.ones(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "past_key_values": past,
    }
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True))
    OnnxExporter.save_program(exported.program, folder / "model.onnx")
    return folder / "model.onnx"


def optimum(folder: Path, layers: int, *, family: str) -> Path:
    """optimum's exporter."""
    from exporter.export.forms.portable import export_with_optimum

    return export_with_optimum(loaded(family, layers), folder)


def optimum_merged(folder: Path, layers: int) -> Path:
    """optimum's decoder whose first and later steps are the branches of one If."""
    from optimum.exporters.onnx import main_export

    made = family_loaded("t5", num_layers=layers, num_decoder_layers=layers)
    made.model.save_pretrained(folder / "checkpoint")
    task = "text2text-generation-with-past"
    main_export(str(folder / "checkpoint"), output=folder, task=task, do_validation=False)
    return folder / "decoder_model_merged.onnx"


def genai(folder: Path, layers: int, *, precision: str, family: str = "llama") -> Path:
    """onnxruntime-genai's model builder, which reads a folder."""
    from onnxruntime_genai.models import builder

    made, checkpoint = loaded(family, layers), folder / "checkpoint"
    made.model.generation_config.max_length = None
    made.model.save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    place = [str(checkpoint), "", str(folder / "built"), precision, "cpu", str(folder / "cache")]
    builder.create_model(*place, **builder.parse_extra_options(*place, []))
    return folder / "built" / "model.onnx"


def optimised(folder: Path, source: Path, *, model_type: str, multi_head: bool = False) -> Path:
    """onnxruntime.transformers.optimizer: attentions, skip-norms and embeddings in one node."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions(model_type)
    options.use_multi_head_attention = multi_head
    fused = optimize_model(
        str(source), model_type=model_type, num_heads=HEADS, hidden_size=HIDDEN,
        optimization_options=options, opt_level=0,
    )  # fmt: skip
    fused.save_model_to_file(str(folder / "model.onnx"))
    return folder / "model.onnx"


def fused_by_runtime(folder: Path, source: Path) -> Path:
    """What ONNX Runtime makes of a graph for its CPU kernels, hardware layouts aside."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(folder / "model.onnx")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return folder / "model.onnx"


def int8_dynamic(folder: Path, source: Path) -> Path:
    """int8 weights, activations quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, folder / "model.onnx")
    return folder / "model.onnx"


def int8_static(folder: Path, source: Path) -> Path:
    """int8 between QuantizeLinear and DequantizeLinear."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    from exporter.cut.random_inputs import cases, draw
    from graph_passes.files.storage import load_model

    model, rng = load_model(source), np.random.default_rng(0)
    feeds = iter([draw(model, case, rng) for case in cases(model)][-1:])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feeds, None)

    target = folder / "model.onnx"
    quantize_static(source, target, Reader(), quant_format=QuantFormat.QDQ)
    return target


def int4(folder: Path, source: Path) -> Path:
    """int4 weights in MatMulNBits."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(str(source))
    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "model.onnx"))
    return folder / "model.onnx"
