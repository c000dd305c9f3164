"""What makes two runs comparable."""

from __future__ import annotations

import re
from collections.abc import Iterable

from exporter.artifacts import (
    Arm,
    ComparisonReport,
    FormRecord,
    KeyDifference,
    QuantizationRecord,
    RunKey,
)
from exporter.files import sha256_bytes

FIELDS = tuple(RunKey.model_fields)
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-rtx",
    "tensorrt-rtx-cu12",
    "torch",
    "openvino",
    "llama-cpp-python",
)
"""Distributions that run an arm; each is named like the backends that it serves."""


def key_of(report: ComparisonReport) -> RunKey:
    """The key of a report."""
    arms, machine = (report.arms.baseline, report.arms.candidate), report.environment
    gpu, _, driver = (machine.gpu or "").partition(", ")
    device = f"{machine.processor}, {machine.cpu_count} CPUs, {machine.machine}"
    versions = {name: report.versions[name] for name in _runtimes(report)}
    return RunKey(
        model=arms[0].sha256,
        backend=_both(arm.backend for arm in arms),
        provider=_both(arm.provider for arm in arms),
        precision=_both(arm.precision for arm in arms),
        device=f"{device}; {gpu}" if gpu else device,
        threads=machine.threads,
        shapes=sorted(row.shape_name for row in report.latency),
        text=_text(report),
        versions=versions | ({"driver": driver} if driver else {}) | _engines(arms),
        form=_noted(arm.form for arm in arms),
        quantization=_noted(arm.quantization for arm in arms),
    )


def key_sha256(key: RunKey) -> str:
    """One hash over the whole key."""
    return sha256_bytes(key.model_dump_json(exclude_defaults=True).encode())


def series(key: RunKey) -> str:
    """One hash over what stays when a library is updated or a shape is added."""
    changing = {"shapes", "text", "versions"}
    kept = key.model_dump_json(exclude=changing, exclude_defaults=True)
    return sha256_bytes(kept.encode())


def differences(baseline: RunKey, report: RunKey) -> list[KeyDifference]:
    """The fields in which two keys differ, with both values in words."""
    return [
        KeyDifference(
            field=name,
            baseline=_words(getattr(baseline, name)),
            report=_words(getattr(report, name)),
        )
        for name in FIELDS
        if getattr(baseline, name) != getattr(report, name)
    ]


def difference_words(found: list[KeyDifference]) -> str:
    """The differences for an error's text."""
    return "; ".join(f"{d.field}: {d.baseline} there, {d.report} here" for d in found)


def _both(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _noted(records: Iterable[FormRecord | QuantizationRecord | None]) -> str | None:
    """What both arms note, or each; None where neither notes anything."""
    names = [None if record is None else record.name for record in records]
    return _both(name or "none" for name in names) if any(names) else None


def _runtimes(report: ComparisonReport) -> list[str]:
    used = {arm.backend.replace("_", "-").lower() for arm in _timed_arms(report)}
    return [
        name
        for name in _RUNTIMES
        if name in report.versions and any(_serves(name, backend) for backend in used)
    ]


def _serves(distribution: str, backend: str) -> bool:
    distribution = distribution.removesuffix("-cu12")
    if backend.startswith("tensorrt-rtx"):
        return distribution == "tensorrt-rtx"
    if backend in ("pytorch", "torch.compile"):
        return distribution == "torch"
    if backend == "llama.cpp":
        return distribution == "llama-cpp-python"
    return distribution.removesuffix("-gpu") == backend


def _timed_arms(report: ComparisonReport) -> tuple[Arm, Arm]:
    return report.arms.baseline, report.arms.candidate


def _engines(arms: tuple[Arm, Arm]) -> dict[str, str]:
    """The builders' versions, which may be others than the installed ones."""
    backend_versions = {engine.backend_version for arm in arms for engine in arm.engines}
    return {"engines": ", ".join(sorted(backend_versions))} if backend_versions else {}


def _text(report: ComparisonReport) -> str | None:
    if report.accuracy is None:
        return None
    accuracy = report.accuracy
    return f"{accuracy.text_sha256}, {accuracy.tokens} tokens"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items()) or "none"
    if isinstance(value, list):
        return " | ".join(value) or "none"
    text = "none" if value is None else str(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)
