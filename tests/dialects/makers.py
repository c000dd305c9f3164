"""How each tool writes the tiny models: one function a tool, from a folder and a depth."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_models import family_loaded, tiny_tokenizer


@dataclass
class Workshop:
    """Where graphs are made, each once."""

    root: Path
    _made: dict[tuple[str, int], Path] = field(default_factory=dict)

    def make(self, name: str, maker: Maker, layers: int) -> Path:
        """The graph of a dialect with so many layers."""
        key = (name, layers)
        if key not in self._made:
            folder = self.root / f"{name}-{layers}"
            folder.mkdir(parents=True)
            with _quiet():
                self._made[key] = maker(self, folder, layers)
        return self._made[key]


Maker = Callable[[Workshop, Path, int], Path]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tools print and warn at length; errors still come as exceptions."""
    import logging

    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def dynamo(family: str, opset: int, dtype: str = "float32") -> Maker:
    """PyTorch's exporter as depthcut calls it."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        from exporter.export.torch_export import export_onnx

        return export_onnx(loaded(family, layers, dtype=dtype), folder, opset=opset)

    return make


def torchscript(family: str, opset: int) -> Maker:
    """PyTorch's old exporter, mask and positions given."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        import torch

        made = loaded(family, layers, eager=True)
        if family == "bert":
            module, example = flat_encoder(made)
            inputs, outputs = ENCODER_INPUTS, ["last_hidden_state"]
        else:
            module, example, interface = flat_decoder(made)
            inputs, outputs = interface.input_names, interface.output_names
        path = folder / "model.onnx"
        torch.onnx.export(
            module, example, str(path), dynamo=False, opset_version=opset, input_names=inputs,
            output_names=outputs, dynamic_axes=axes(inputs, outputs),
        )  # fmt: skip
        return path

    return make


def transformers_exporter(shop: Workshop, folder: Path, layers: int) -> Path:
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
    path = folder / "model.onnx"
    OnnxExporter.save_program(exported.program, path)
    return path


def optimum(family: str) -> Maker:
    """optimum's exporter as depthcut calls it."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        from exporter.export.forms.portable import export_with_optimum

        return export_with_optimum(loaded(family, layers), folder)

    return make


def optimum_merged(shop: Workshop, folder: Path, layers: int) -> Path:
    """optimum's decoder whose first and later steps are the branches of one If."""
    from optimum.exporters.onnx import main_export

    made = family_loaded("t5", num_layers=layers, num_decoder_layers=layers)
    made.model.save_pretrained(folder / "checkpoint")
    task = "text2text-generation-with-past"
    main_export(str(folder / "checkpoint"), output=folder, task=task, do_validation=False)
    return folder / "decoder_model_merged.onnx"


def genai(precision: str, family: str = "llama") -> Maker:
    """onnxruntime-genai's model builder."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        from onnxruntime_genai.models import builder

        written = str(checkpoint(folder / "checkpoint", family, layers))
        place = [written, "", str(folder / "built"), precision, "cpu", str(folder / "cache")]
        builder.create_model(*place, **builder.parse_extra_options(*place, []))
        return folder / "built" / "model.onnx"

    return make


def transformers_optimizer(
    source: Maker, name: str, model_type: str, *, multi_head: bool = False
) -> Maker:
    """onnxruntime.transformers.optimizer: attentions, skip-norms and embeddings in one node."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        options = FusionOptions(model_type)
        options.use_multi_head_attention = multi_head
        fused = optimize_model(
            str(shop.make(name, source, layers)), model_type=model_type, num_heads=HEADS,
            hidden_size=HIDDEN, optimization_options=options, opt_level=0,
        )  # fmt: skip
        fused.save_model_to_file(str(folder / "model.onnx"))
        return folder / "model.onnx"

    return make


def runtime_optimised(source: Maker, name: str) -> Maker:
    """What ONNX Runtime saves after its own fusions."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        from tests.dialects.checks import optimised_copy

        return optimised_copy(shop.make(name, source, layers), folder / "model.onnx")

    return make


def quantised_dynamic(source: Maker, name: str) -> Maker:
    """int8 weights, activations quantised as they come."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(shop.make(name, source, layers), folder / "model.onnx")
        return folder / "model.onnx"

    return make


def quantised_static(source: Maker, name: str) -> Maker:
    """int8 between QuantizeLinear and DequantizeLinear."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

        from exporter.cut.random_inputs import cases, draw
        from graph_passes.files.storage import load_model

        path = shop.make(name, source, layers)
        model = load_model(path)
        rng = np.random.default_rng(0)
        feeds = iter([draw(model, case, rng) for case in cases(model)][-1:])

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def get_next(self) -> Any:
                return next(feeds, None)

        target = folder / "model.onnx"
        quantize_static(path, target, Reader(), quant_format=QuantFormat.QDQ)
        return target

    return make


def quantised_int4(source: Maker, name: str) -> Maker:
    """int4 weights in MatMulNBits."""

    def make(shop: Workshop, folder: Path, layers: int) -> Path:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(str(shop.make(name, source, layers))), block_size=32, is_symmetric=True
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(folder / "model.onnx"))
        return folder / "model.onnx"

    return make


HEADS, HIDDEN = 4, 64
ENCODER_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 0, "vocab_size": 96, "hidden_size": HIDDEN},
    "bert": {"num_hidden_layers": 0, "hidden_size": HIDDEN},
    "gpt2": {"n_layer": 0},
    "gemma2": {"num_hidden_layers": 0, "vocab_size": 96, "hidden_size": HIDDEN, "head_dim": 16}
    | {"sliding_window": 8},
}


def loaded(family: str, layers: int, *, dtype: str = "float32", eager: bool = False) -> Any:
    """A model of a family, as the loader gives it."""
    changes = {k: layers if "layer" in k else v for k, v in _SIZES[family].items()}
    if eager:
        changes["attn_implementation"] = "eager"
    made = family_loaded(family, dtype=dtype, initializer_range=0.2, **changes)
    for name, weight in made.model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide whose bias goes where
            weight.normal_(std=0.1)
    return made


def checkpoint(folder: Path, family: str, layers: int) -> Path:
    """A folder with a decoder and a tokenizer, for builders that read one."""
    made = loaded(family, layers)
    made.model.generation_config.max_length = None
    made.model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def flat_decoder(made: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """A decoder as a module of plain tensors, an example of its inputs, and its interface."""
    import torch

    from exporter.models.onnx_interface import InterfaceModule, interface_of

    interface = interface_of(made.model)
    inner = InterfaceModule(made.model, interface)
    count = len(interface.token_inputs)

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *values: Any) -> Any:
            tokens = dict(zip(interface.token_inputs, values[:count], strict=True))
            return tuple(self.inner(tokens, values[count:]))

    ids = torch.ones(2, 3, dtype=torch.long)
    positions = torch.arange(5, 8).expand(2, -1).contiguous()
    tokens = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "position_ids": positions,
    }
    example = [tokens[name] for name in interface.token_inputs]
    return Flat(), (*example, *interface.random_past(2, 5)), interface


def flat_encoder(made: Any) -> tuple[Any, tuple[Any, ...]]:
    """An encoder as a module of plain tensors, and an example of its inputs."""
    import torch

    model = made.model

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *inputs: Any) -> Any:
            named = dict(zip(ENCODER_INPUTS, inputs, strict=True))
            return self.inner(**named).last_hidden_state

    return Encoder(), (torch.ones(2, 6, dtype=torch.long),) * len(ENCODER_INPUTS)


def axes(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, dict[int, str]]:
    """Named dimensions, as TorchScript's exporter takes them."""
    lines: dict[str, dict[int, str]] = {}
    for name in (*inputs, *outputs):
        if name.startswith("past"):
            lines[name] = {0: "batch", 2: "past"}
        elif name.startswith("present") or name == "attention_mask":
            lines[name] = {0: "batch", 2 if name.startswith("present") else 1: "total"}
        else:
            lines[name] = {0: "batch", 1: "sequence"}
    return lines
