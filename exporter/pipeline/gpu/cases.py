"""The shapes that a session measures: those for a card, and tiny ones for a rehearsal without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from exporter.engines.tensors import TOLERANCE
from exporter.pipeline.gpu.llama_shaped import LlamaShape

TOKENS = 90
"""Random tokens are drawn below it: no vocabulary is smaller."""
_FORM = {"fused_attention": True, "positions": True}

# With Attention as one operator: of the decomposed one TensorRT-RTX 1.7 writes keys and values
# out for each query head, 4.3 GB a layer at batch 64 and 4096 tokens instead of 0.02.
LLAMA_8B = LlamaShape(
    layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256,
    dtype=ir.DataType.BFLOAT16, **_FORM,
)  # fmt: skip
LLAMA_70B = replace(LLAMA_8B, layers=80, hidden=8192, heads=64, intermediate=28672)
SMOLLM2 = LlamaShape(
    layers=30, hidden=576, heads=9, kv_heads=3, intermediate=1536, vocabulary=49152,
    dtype=ir.DataType.FLOAT16, **_FORM,
)  # fmt: skip
TINY = LlamaShape(
    layers=2, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=97,
    dtype=ir.DataType.FLOAT, **_FORM,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        tiny: The decoder whose logits are held against ONNX Runtime's.
        dtypes: In which, each with the error that it may have, as a share of the largest logit.
        attention: A few layers with hardly a vocabulary, so that attention is what takes time.
        pasts: Positions filled where attention is timed.
        batches: At these numbers of sequences.
        head: A few layers with a whole vocabulary, for the logits of a prompt.
        small: A small model, whole and cut, at these prompts and pasts.
        lengths: See ``small``.
        large: By name, the shapes whose largest batch is looked for.
        prompt: Tokens of each prompt there.
        new: Tokens that each sequence generates there.
        room: Positions of the caches, everywhere.
        warm_up: Runs before times are taken.
        samples: Times that are taken.
    """

    tiny: LlamaShape
    dtypes: Mapping[ir.DataType, float]
    attention: LlamaShape
    pasts: tuple[int, ...]
    batches: tuple[int, ...]
    head: LlamaShape
    small: LlamaShape
    lengths: tuple[int, ...]
    large: Mapping[str, LlamaShape]
    prompt: int
    new: int
    room: int
    warm_up: int
    samples: int


CARD = Case(
    tiny=TINY,
    dtypes={
        ir.DataType.FLOAT: TOLERANCE["fp32"],
        ir.DataType.FLOAT16: TOLERANCE["fp16"],
        ir.DataType.BFLOAT16: TOLERANCE["bf16"],
    },
    attention=replace(LLAMA_8B, layers=4, vocabulary=1024),
    pasts=(64, 512, 4000),
    batches=(1, 64),
    head=replace(LLAMA_8B, layers=4),
    small=SMOLLM2,
    lengths=(512,),
    large={"Llama-3-8B": LLAMA_8B, "Llama-3-70B": LLAMA_70B},
    prompt=2048,
    new=2048,
    room=4096,
    warm_up=20,
    samples=90,  # 4000 positions, the steps before them and these fit the room
)
REHEARSAL = Case(
    tiny=TINY,
    dtypes={ir.DataType.FLOAT: TOLERANCE["fp32"]},
    attention=TINY,
    pasts=(4, 16, 50),
    batches=(1, 4),
    head=TINY,
    small=replace(TINY, layers=4),
    lengths=(16,),
    large={"Llama-3-8B": replace(TINY, layers=4), "Llama-3-70B": replace(TINY, layers=24)},
    prompt=16,
    new=16,
    room=64,
    warm_up=1,
    samples=3,
)
"""Its shapes keep their names: what is rehearsed is the session of the large ones."""
