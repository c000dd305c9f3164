"""Reports as `depthcut compare` writes them, with chosen times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.artifacts import (
    Accuracy,
    Arm,
    Arms,
    ComparisonReport,
    Environment,
    LatencyRow,
    LatencySamples,
    NoiseFloor,
    PerplexityPair,
    Speedup,
)

LENGTHS = (128, 512)


def samples(median_ms: float, count: int = 12) -> LatencySamples:
    return LatencySamples(
        median_ms=median_ms,
        p50_ms=median_ms,
        p95_ms=median_ms * 1.2,
        p99_ms=median_ms * 1.5,
        samples_ms=[median_ms] * count,
    )


def gate_row(
    length: int = 128,
    *,
    candidate_ms: float = 80.0,
    baseline_ms: float = 100.0,
    width: float = 0.01,
    rounds: int = 12,
    noise: float | None = None,
    **changes: Any,
) -> LatencyRow:
    """A row whose speedup's interval reaches ``width`` (a share) to both sides."""
    ratio = baseline_ms / candidate_ms
    equal = Speedup(ratio=1.0, ci95=(0.99, 1.01))
    values: dict[str, Any] = {
        "phase": "prefill",
        "batch": 1,
        "sequence_length": length,
        "past_length": 0,
        "rounds": rounds,
        "baseline": samples(baseline_ms, rounds),
        "candidate": samples(candidate_ms, rounds),
        "speedup": Speedup(ratio=ratio, ci95=(ratio / (1 + width), ratio * (1 + width))),
        "verdict": "faster",
        "noise_floor": None if noise is None else NoiseFloor(ratio=noise, rounds=6, speedup=equal),
    }
    return LatencyRow(**{**values, **changes})


def gate_arm(name: str, **changes: Any) -> Arm:
    values: dict[str, Any] = {
        "backend": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "path": f"{name}/model.onnx",
        "sha256": name[0] * 64,
        "file_bytes": 1_000_000,
        "parameters": 250_000,
        "nodes": 100,
        "kv_cache_bytes_per_token": 4096,
    }
    return Arm(**{**values, **changes})


def gate_accuracy(candidate: float = 20.0, **changes: Any) -> Accuracy:
    values: dict[str, Any] = {
        "text_source": "text",
        "text_sha256": "e" * 64,
        "tokens": 4096,
        "perplexity": PerplexityPair(baseline=16.0, candidate=candidate),
        "kl_divergence": 0.2,
        "top1_agreement": 0.8,
    }
    return Accuracy(**{**values, **changes})


def gate_report(
    rows: Sequence[LatencyRow] | None = None, *, machine: str = "Test CPU", **changes: Any
) -> ComparisonReport:
    environment = Environment(
        machine="x86_64",
        processor=machine,
        cpu_count=2,
        threads=2,
        memory_bytes=8 << 30,
        platform="Linux",
        python="3.11.2",
    )
    values: dict[str, Any] = {
        "versions": {"depthcut": "0.1.0", "onnxruntime": "1.32.0", "torch": "2.13"},
        "command": ["depthcut", "compare", "base", "cand", "-o", "out"],
        "environment": environment,
        "arms": Arms(baseline=gate_arm("base"), candidate=gate_arm("cand")),
        "parity": [],
        "latency": [gate_row(n) for n in LENGTHS] if rows is None else list(rows),
        "accuracy": gate_accuracy(),
    }
    return ComparisonReport(**{**values, **changes})
