"""The dialects: who writes them, what they need, and what is expected of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.dialects import makers
from tests.trials import quiet

_FP32 = 1e-5
_FP16 = 2e-3  # two units in the last place


@dataclass(frozen=True)
class Dialect:
    """One way to write a Transformer in ONNX; ``of`` names the dialect that it is made of."""

    name: str
    tools: tuple[str, ...]
    make: Callable[..., Path]
    precision: str = "fp32"
    of: str = ""
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


@dataclass
class Workshop:
    """Where graphs are made, each once."""

    root: Path
    _made: dict[tuple[str, int], Path] = field(default_factory=dict)

    def make(self, name: str, layers: int) -> Path:
        """The graph of a dialect with so many layers."""
        key, dialect = (name, layers), BY_NAME[name]
        if key not in self._made:
            folder = self.root / f"{name}-{layers}"
            folder.mkdir(parents=True)
            source = self.make(dialect.of, layers) if dialect.of else layers
            with quiet():
                self._made[key] = dialect.make(folder, source)
        return self._made[key]


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


def _dynamo(name: str, family: str = "llama", opset: int = 20, **changes: Any) -> Dialect:
    make = partial(makers.dynamo, family=family, opset=opset, dtype=changes.pop("dtype", "float32"))
    return Dialect(f"torch dynamo, {name}", ("torch",), make, traced=True, **changes)


def _torchscript(family: str, opset: int = 14, **changes: Any) -> Dialect:
    make = partial(makers.torchscript, family=family, opset=opset)
    return Dialect(f"TorchScript, {family}", ("torch",), make, **changes)


def _optimum(name: str, make: Callable[..., Path] | None = None, **changes: Any) -> Dialect:
    make = make or partial(makers.optimum, family=name)
    tools = ("optimum-onnx", "torch")
    return Dialect(f"optimum, {name}", tools, make, **({"tier": "optimum"} | changes))


def _runtime(name: str, of: str, make: Callable[..., Path], **changes: Any) -> Dialect:
    """What ONNX Runtime's tools make of a graph of PyTorch's."""
    traced = of.startswith("torch dynamo")
    return Dialect(name, ("onnxruntime", "torch"), make, of=of, traced=traced, **changes)


def _optimizer(name: str, of: str, model_type: str, note: str, **changes: Any) -> Dialect:
    multi_head = "MultiHead" in name
    make = partial(makers.optimised, model_type=model_type, multi_head=multi_head)
    return _runtime(f"onnxruntime optimizer, {name}", of, make, note=note, **changes)


def _genai(name: str, note: str, precision: str = "fp32", family: str = "llama") -> Dialect:
    make = partial(makers.genai, precision=precision, family=family)
    tools = ("onnxruntime-genai", "torch")
    name = f"onnxruntime-genai builder, {name}"
    return Dialect(name, tools, make, precision, tier="genai", note=note)


_LLAMA, _BERT, _GPT2 = "torch dynamo, llama, opset 20", "TorchScript, bert", "TorchScript, gpt2"
_QDQ = "QuantizeLinear, DequantizeLinear"
_ENCODER: dict[str, Any] = {"stays": 2}
_TABLE_ONLY: dict[str, Any] = {"tier": None}

DIALECTS = (
    _dynamo("llama, opset 18", opset=18, **_TABLE_ONLY),
    _dynamo("llama, opset 20"),
    _dynamo("llama, opset 23", opset=23, **_TABLE_ONLY),
    _dynamo("llama, opset 24", opset=24),
    _dynamo("llama, fp16", dtype="float16", precision="fp16", tolerance=_FP16, **_TABLE_ONLY),
    _dynamo(
        "llama, bf16",
        dtype="bfloat16",
        precision="bf16",
        runs=False,
        note="run in float32: the CPU has no bf16 kernels",
    ),
    _dynamo("gpt2", "gpt2", **_TABLE_ONLY),
    _dynamo("bert", "bert", **_TABLE_ONLY, **_ENCODER),
    _torchscript("llama", 18),
    _torchscript("gpt2"),
    _torchscript("bert", **_ENCODER),
    Dialect(
        "transformers OnnxExporter, llama",
        ("transformers", "torch"),
        makers.transformers_exporter,
        traced=True,
        note="caches are named past_key_values.layers.N.keys",
    ),
    _optimum("llama"),
    _optimum("gpt2", **_TABLE_ONLY),
    _optimum("bert", **_ENCODER),
    _optimum("merged decoder", makers.optimum_merged, refused=True),
    _optimizer(
        "bert", _BERT, "bert", "EmbedLayerNormalization, Attention, SkipLayerNormalization",
        **_ENCODER,
    ),
    _optimizer(
        "bert, MultiHeadAttention", _BERT, "bert",
        "EmbedLayerNormalization, MultiHeadAttention, SkipLayerNormalization", **_ENCODER,
    ),
    _optimizer("gpt2", _GPT2, "gpt2", "SkipLayerNormalization"),
    _optimizer("llama", _LLAMA, "gpt_neox", "SkipSimplifiedLayerNormalization"),
    _runtime("ONNX Runtime's own fusions, bert", _BERT, makers.fused_by_runtime, **_ENCODER),
    _genai("llama", "GroupQueryAttention, SkipSimplifiedLayerNormalization"),
    _genai(
        "llama, int4",
        "the same with MatMulNBits, whose inputs stay in float32 for the comparison",
        "int4",
    ),
    _genai(
        "gemma2",
        "sandwich norms; every other cache is a buffer of a window's size",
        family="gemma2",
    ),
    _runtime(
        "dynamic int8, llama", _LLAMA, makers.int8_dynamic,
        precision="int8", note="DynamicQuantizeLinear, MatMulInteger",
    ),
    _runtime("QDQ int8, llama", _LLAMA, makers.int8_static, precision="int8", note=_QDQ),
    _runtime(
        "QDQ int8, bert", _BERT, makers.int8_static,
        precision="int8", stays=None, note=_QDQ, **_TABLE_ONLY,
    ),
    _runtime("MatMulNBits int4, llama", _LLAMA, makers.int4, precision="int4"),
)  # fmt: skip
BY_NAME = {dialect.name: dialect for dialect in DIALECTS}
