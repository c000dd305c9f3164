from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from exporter.artifacts.latency import Shape
from exporter.compare.options import CompareOptions
from exporter.engines.build.engine_set import EngineRecord, EngineTensor, sidecar_path
from exporter.engines.build.libraries import Device
from exporter.engines.build.profiles import Ranges, Span, profile
from exporter.engines.build.settings import BuildSettings, Profile
from exporter.engines.runners.base import Runner
from exporter.engines.runners.onnxruntime import OnnxRuntimeRunner
from exporter.engines.tensors import make_inputs
from exporter.files import sha256_bytes

CONTENT = b"not really an engine"


def record(**changes: Any) -> EngineRecord:
    """The record of an engine whose content is CONTENT."""
    facts: dict[str, Any] = {
        "engine": "m.engine", "engine_sha256": sha256_bytes(CONTENT), "engine_bytes": len(CONTENT),
        "backend": "tensorrt-rtx", "backend_version": "1.7.1.116", "built_on": {},
        "settings": BuildSettings(compute_capabilities=("sm89",)), "precision": "fp16", "plan": [],
        "profiles": [Profile(phase="encode", shapes={})], "inputs": [], "outputs": [],
        "network_layers": 9, "layers": {"kgen": 2},
        "memory_bytes": {}, "fixed_addresses": True, "parse_s": 0.1, "build_s": 1.0, "total_s": 1.2,
    }  # fmt: skip
    return EngineRecord.model_validate({**facts, **changes})


def written(folder: Path, **changes: Any) -> Path:
    """An engine file and its record."""
    engine = folder / "m.engine"
    engine.write_bytes(CONTENT)
    record(**changes).write(sidecar_path(engine))
    return engine


CACHE = ("past_key_values.0.key", "past_key_values.0.value")


def decoder_record(phases: Sequence[str], **changes: Any) -> EngineRecord:
    """The record of a decoder with one layer: batch 1 to 2, prompt 1 to 6, context 1 to 8."""
    tensors = {
        "input_ids": ("int64", (-1, -1)),
        "attention_mask": ("int64", (-1, -1)),
        **dict.fromkeys(CACHE, ("bf16", (-1, 2, -1, 4))),
    }
    outputs = {"logits": ("bf16", (-1, -1, 16))}
    outputs |= {f"present.0.{part}": ("bf16", (-1, 2, -1, 4)) for part in ("key", "value")}
    inputs = [_tensor(name, *tensor) for name, tensor in tensors.items()]
    ranges = Ranges(batch=Span(1, 1, 2), prompt=Span(1, 4, 6), context=Span(1, 4, 8))
    facts: dict[str, Any] = {
        "profiles": [profile([item.spec for item in inputs], phase, ranges) for phase in phases],
        "inputs": inputs,
        "outputs": [_tensor(name, *output) for name, output in outputs.items()],
        "made_from": {"model": "a" * 64},
    }
    return record(**{**facts, **changes})


def written_as(engine: Path, phases: Sequence[str], **changes: Any) -> Path:
    """An engine file of a decoder, and its record."""
    engine.write_bytes(CONTENT)
    decoder_record(phases, engine=engine.name, **changes).write(sidecar_path(engine))
    return engine


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> EngineTensor:
    return EngineTensor(name=name, dtype=dtype, shape=shape)


SHORT = CompareOptions(
    threads=1, prefill_lengths=(4,), decode_past_lengths=(), rounds=2, eval_tokens=32,
    eval_sequence_length=16,
)  # fmt: skip
"""A comparison that takes no time."""

CARD = Device("a card", "sm89", 24 << 30)
SMALL = Ranges(prompt=Span(1, 4, 8), context=Span(1, 4, 8))
SM89 = BuildSettings(compute_capabilities=("sm89",))
"""What is built where there is no card."""


@contextlib.contextmanager
def bindings() -> Iterator[list[Any]]:
    """What the calls that ONNX Runtime prepares meanwhile are bound to."""
    bound: list[Any] = []
    real = OnnxRuntimeRunner._bound_inputs

    def kept(runner: OnnxRuntimeRunner, inputs: Any) -> Any:
        bound.append(real(runner, inputs))
        return bound[-1]

    with mock.patch.object(OnnxRuntimeRunner, "_bound_inputs", kept):
        yield bound


def apart(values: Any, wanted: Any) -> float:
    """The largest difference, as a share of the largest number where that is above 1."""
    first, second = np.asarray(values), np.asarray(wanted)
    return float(np.abs(first - second).max()) / max(1.0, float(np.abs(second).max()))


def in_steps(
    runner: Runner, ids: Any, mask: Any, steps: Sequence[int]
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """The logits of all steps, each on the caches of those before; and the caches after them."""
    logits, cache, done = [], {}, 0
    for new in steps:
        shape = Shape("prefill", len(ids), new, done)
        inputs = make_inputs(runner.inputs, shape, ids[:, done : done + new], cache=cache or None)
        done += new
        inputs["attention_mask"] = mask[:, :done].astype(inputs["attention_mask"].dtype)
        if "position_ids" in inputs:
            inputs["position_ids"] = (mask[:, :done].cumsum(1) - 1).clip(min=0)[:, -new:]
        outputs = runner.run(inputs)
        cache = {n: outputs[n.replace("past_key_values", "present")] for n in inputs if "past" in n}
        logits.append(outputs["logits"])
    return np.concatenate(logits, axis=1), cache
