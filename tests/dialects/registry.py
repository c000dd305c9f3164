"""The dialects: who writes them, what they need, and what is expected of them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from tests.dialects import makers
from tests.dialects.makers import Maker

_FP32 = 1e-5
_FP16 = 2e-3  # two units in the last place


@dataclass(frozen=True)
class Dialect:
    """One way to write a Transformer in ONNX."""

    name: str
    tools: tuple[str, ...]
    precision: str
    make: Maker
    tier: str | None = "torch"
    tolerance: float = _FP32
    runs: bool = True
    refused: bool = False
    stays: int | None = 0
    traced: bool = False
    note: str = ""

    @property
    def missing(self) -> str | None:
        """The first module that is needed and not installed."""
        modules = [_MODULES[tool] for tool in self.tools]
        return next((m for m in modules if not _is_there(m)), None)


_MODULES = {
    "torch": "torch",
    "transformers": "transformers.exporters",
    "optimum-onnx": "optimum.exporters.onnx",
    "onnxruntime-genai": "onnxruntime_genai",
    "onnxruntime": "onnxruntime",
}


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _pytorch(name: str, make: Maker, **changes: Any) -> Dialect:
    """A dialect of PyTorch's exporters."""
    return Dialect(name, ("torch",), changes.pop("precision", "fp32"), make, **changes)


def _dynamo(name: str, make: Maker, **changes: Any) -> Dialect:
    return _pytorch(f"torch dynamo, {name}", make, traced=True, **changes)


def _runtime(name: str, make: Maker, **changes: Any) -> Dialect:
    """What ONNX Runtime's tools make of a graph of PyTorch's."""
    tools = ("onnxruntime", "torch")
    return Dialect(name, tools, changes.pop("precision", "fp32"), make, **changes)


def _optimum(name: str, make: Maker, **changes: Any) -> Dialect:
    tools = ("optimum-onnx", "torch")
    return Dialect(f"optimum, {name}", tools, "fp32", make, **({"tier": "optimum"} | changes))


def _genai(name: str, precision: str, note: str, family: str = "llama") -> Dialect:
    tools, make = ("onnxruntime-genai", "torch"), makers.genai(precision, family)
    return Dialect(f"onnxruntime-genai builder, {name}", tools, precision, make, "genai", note=note)


_LLAMA, _BERT, _GPT2 = "torch dynamo, llama, opset 20", "TorchScript, bert", "TorchScript, gpt2"
_llama = makers.dynamo("llama", 20)
_bert = makers.torchscript("bert", 14)
_gpt2 = makers.torchscript("gpt2", 14)
_optimizer = makers.transformers_optimizer
_QDQ = "QuantizeLinear, DequantizeLinear"
_ENCODER: dict[str, Any] = {"stays": 2}
_TABLE_ONLY: dict[str, Any] = {"tier": None}

DIALECTS = (
    _dynamo("llama, opset 18", makers.dynamo("llama", 18), **_TABLE_ONLY),
    _dynamo("llama, opset 20", _llama),
    _dynamo("llama, opset 23", makers.dynamo("llama", 23), **_TABLE_ONLY),
    _dynamo("llama, opset 24", makers.dynamo("llama", 24)),
    _dynamo(
        "llama, fp16", makers.dynamo("llama", 20, "float16"),
        precision="fp16", tolerance=_FP16, **_TABLE_ONLY,
    ),
    _dynamo(
        "llama, bf16", makers.dynamo("llama", 20, "bfloat16"),
        precision="bf16", runs=False, note="run in float32: the CPU has no bf16 kernels",
    ),
    _dynamo("gpt2", makers.dynamo("gpt2", 20), **_TABLE_ONLY),
    _dynamo("bert", makers.dynamo("bert", 20), **_TABLE_ONLY, **_ENCODER),
    _pytorch("TorchScript, llama", makers.torchscript("llama", 18)),
    _pytorch(_GPT2, _gpt2),
    _pytorch(_BERT, _bert, **_ENCODER),
    Dialect(
        "transformers OnnxExporter, llama", ("transformers", "torch"), "fp32",
        makers.transformers_exporter, traced=True,
        note="caches are named past_key_values.layers.N.keys",
    ),
    _optimum("llama", makers.optimum("llama")),
    _optimum("gpt2", makers.optimum("gpt2"), **_TABLE_ONLY),
    _optimum("bert", makers.optimum("bert"), **_ENCODER),
    _optimum("merged decoder", makers.optimum_merged, refused=True),
    _runtime(
        "onnxruntime optimizer, bert", _optimizer(_bert, _BERT, "bert"), **_ENCODER,
        note="EmbedLayerNormalization, Attention, SkipLayerNormalization",
    ),
    _runtime(
        "onnxruntime optimizer, bert, MultiHeadAttention",
        _optimizer(_bert, _BERT, "bert", multi_head=True), **_ENCODER,
        note="EmbedLayerNormalization, MultiHeadAttention, SkipLayerNormalization",
    ),
    _runtime(
        "onnxruntime optimizer, gpt2", _optimizer(_gpt2, _GPT2, "gpt2"),
        note="SkipLayerNormalization",
    ),
    _runtime(
        "onnxruntime optimizer, llama", _optimizer(_llama, _LLAMA, "gpt_neox"), traced=True,
        note="SkipSimplifiedLayerNormalization",
    ),
    _runtime(
        "ONNX Runtime's own fusions, bert", makers.runtime_optimised(_bert, _BERT), **_ENCODER
    ),
    _genai("llama", "fp32", "GroupQueryAttention, SkipSimplifiedLayerNormalization"),
    _genai(
        "llama, int4", "int4",
        "the same with MatMulNBits, whose inputs stay in float32 for the comparison",
    ),
    _genai(
        "gemma2", "fp32", "sandwich norms; every other cache is a buffer of a window's size",
        family="gemma2",
    ),
    _runtime(
        "dynamic int8, llama", makers.quantised_dynamic(_llama, _LLAMA),
        precision="int8", traced=True, note="DynamicQuantizeLinear, MatMulInteger",
    ),
    _runtime(
        "QDQ int8, llama", makers.quantised_static(_llama, _LLAMA),
        precision="int8", traced=True, note=_QDQ,
    ),
    _runtime(
        "QDQ int8, bert", makers.quantised_static(_bert, _BERT),
        precision="int8", stays=None, note=_QDQ, **_TABLE_ONLY,
    ),
    _runtime(
        "MatMulNBits int4, llama", makers.quantised_int4(_llama, _LLAMA),
        precision="int4", traced=True,
    ),
)  # fmt: skip
