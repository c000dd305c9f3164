"""The same decode step by torch.compile, for the figure beside the engine's."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.gpu_models import Case
from tests.llama_shaped import LlamaShape

Call = Callable[[], Any]

WARM_UP, SAMPLES = 10, 200


def compiled_step(case: Case, *, device: str = "cuda") -> list[dict[str, Any]]:
    """One step of transformers' Llama with a static cache, compiled, for each batch.

    Weights are random. The cache is as long as what it holds, so that both read the same. Without
    a GPU it runs a step, and times nothing.

    Args:
        case: Shape, batches and cache.
        device: ``cuda``, or ``cpu`` to see whether it runs at all.
    """
    rows: list[dict[str, Any]] = []
    model = _model(case.shape, device)
    for batch in case.batches:
        step, rewind = _step(model, case, batch, device)
        if device != "cuda":
            for _ in range(2):
                rewind()
                step()
            continue
        times = _times(step, rewind)
        rows.append({
            "part": "torch.compile", "backend": f"torch {torch.__version__}", "batch": batch,
            "past": case.past, "median_ms": statistics.median(times), "samples_ms": times,
        })  # fmt: skip
        print(f"  torch.compile decode, batch {batch}, cache {case.past}: "
              f"{rows[-1]['median_ms']:.3f} ms", flush=True)  # fmt: skip
    return rows


def _model(shape: LlamaShape, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary, max_position_embeddings=8192,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _step(model: Any, case: Case, batch: int, device: str) -> tuple[Call, Call]:
    """The step, and what takes the cache back to where it was before it."""
    from transformers import StaticCache

    from exporter.models.onnx_interface import cache_argument

    cache = StaticCache(config=model.config, max_cache_len=case.past + 1)
    place = torch.device(device)
    argument = cache_argument(model)
    prompt = torch.zeros(batch, case.past, dtype=torch.long, device=place)
    token = torch.zeros(batch, 1, dtype=torch.long, device=place)
    position = torch.full((batch, 1), case.past, device=place)
    with torch.no_grad():  # fills the cache to its last but one position
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{argument: cache})
    lengths = _lengths(cache)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False)

    def rewind() -> None:
        for layer, length in lengths:
            layer.cumulative_length.copy_(length)

    def step() -> Any:
        with torch.no_grad():
            return forward(
                input_ids=token, position_ids=position, use_cache=True, **{argument: cache}
            ).logits

    return step, rewind


def _lengths(cache: Any) -> list[tuple[Any, Any]]:
    """Where a cache keeps how full it is; transformers before 5.4 keeps it nowhere."""
    layers = [layer for layer in cache.layers if hasattr(layer, "cumulative_length")]
    kept = [torch.as_tensor(layer.cumulative_length).clone() for layer in layers]
    return list(zip(layers, kept, strict=True))


def _times(step: Call, rewind: Call) -> list[float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(WARM_UP):
        rewind()
        step()
    times = []
    for _ in range(SAMPLES):
        rewind()
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times
