"""What makes two runs comparable, and what a report must hold to be judged at all."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from exporter.artifacts import (
    Accuracy,
    Arm,
    ComparisonReport,
    FormRecord,
    KeyDifferences,
    LatencyRow,
    QuantizationRecord,
    RunKey,
)
from exporter.artifacts.figures import FIGURES, LIMITED, Reading
from exporter.compare.timing.statistics import estimate_between
from exporter.errors import RegressionError
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


def differences(baseline: RunKey, report: RunKey) -> KeyDifferences:
    """The fields in which two keys differ, with both values in words."""
    values = {name: (getattr(baseline, name), getattr(report, name)) for name in FIELDS}
    return {
        name: (_words(there), _words(here))
        for name, (there, here) in values.items()
        if there != here
    }


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


_TOLERANCE = 1e-3
"""Of a figure against what its own samples give: below every limit that anyone sets."""
_AGAIN = "Measure again with depthcut compare; nothing can be concluded from this report."


def refuse_unsound(report: ComparisonReport, name: str) -> None:
    """Refuses a report that no measurement can have given."""
    for problem in _problems(report):
        raise RegressionError(f"{name}: {problem}.", _AGAIN, code="unsound")


def _problems(report: ComparisonReport) -> Iterator[str]:
    """What isn't a number, or contradicts other numbers; what a collapsed model has is one."""
    for number, row in enumerate(report.latency):
        yield from _of_row(row, f"$.latency[{number}]")
    for engine in (*report.arms.baseline.engines, *report.arms.candidate.engines):
        if engine.check is not None and not engine.check.passed:
            yield f"{engine.path} differs from ONNX Runtime"
    if (accuracy := report.accuracy) is None:
        return
    wrong = [*_not_numbers(accuracy.model_dump(), "$.accuracy")]
    before = (one for one in _with_before(accuracy) if not math.isfinite(one.before or 0.0))
    wrong += [f"$.accuracy.{one.place.before}" for one in before]
    yield from (f"{path} is not a number" for path in wrong)
    for path, value, other, source in _told_twice(accuracy):
        if value is not None and other is not None:
            yield from _contradicted(value, other, f"$.accuracy.{path}", source)


def _of_row(row: LatencyRow, path: str) -> Iterator[str]:
    for arm, times in (("baseline", row.baseline), ("candidate", row.candidate)):
        if (count := len(times.samples_ms)) % row.rounds:
            yield f"{path}.{arm}.samples_ms has {count} times, not {row.rounds} equal rounds"
        sampled = float(np.median(times.samples_ms))
        yield from _contradicted(times.median_ms, sampled, f"{path}.{arm}.median_ms", "samples_ms")
    if row.rounds > 1:
        try:
            sampled = math.exp(estimate_between(row, "baseline", "candidate").log_ratio)
        except ValueError as error:
            yield f"{path}: {error}"
        else:
            ratio = row.speedup.ratio
            yield from _contradicted(ratio, sampled, f"{path}.speedup.ratio", "samples_ms")


def _contradicted(value: float, other: float, path: str, source: str) -> Iterator[str]:
    if not math.isclose(value, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE / 10):
        yield f"{path} is {value:.6g}, but {source} give {other:.6g}"


_ToldTwice = tuple[str, float | None, float | None, str]


def _told_twice(accuracy: Accuracy) -> Iterator[_ToldTwice]:
    """JSON path, what stands there, what should, and what that follows from."""
    for figure in FIGURES:
        for one in figure.readings(accuracy):
            if figure.of_the_cut and one.interval is not None:
                yield f"{one.place.interval}.value", one.interval.value, one.value, figure.key
    for number, task in enumerate(accuracy.tasks):
        candidate = task.candidate - task.baseline
        yield f"tasks[{number}].difference.value", task.difference.value, candidate, "both scores"
    for one in _with_before(accuracy):
        yield from _rise_told_twice(accuracy, one)


def _with_before(accuracy: Accuracy) -> Iterator[Reading]:
    """The values on the text that both arms have."""
    figures = (one for one in LIMITED.values() if one.stands_in == "accuracy")
    return (one for it in figures for one in it.readings(accuracy) if one.before is not None)


def _rise_told_twice(accuracy: Accuracy, one: Reading) -> Iterator[_ToldTwice]:
    assert one.before is not None
    place, losses = one.place, accuracy.sample_losses
    if one.interval is not None:
        # A perplexity above the largest number is infinite; the increase still has its value then.
        most = math.log(sys.float_info.max) - math.log(one.before)
        smallest = min(math.log(one.value) - math.log(one.before), most)
        value = min(one.interval.value, most)
        yield f"{place.interval}.value", value, smallest, place.value.partition(".")[0]
    if losses is None or not sum(losses.tokens):
        return
    for path, value, arm in (
        (place.before, one.before, losses.baseline),
        (place.value, one.value, losses.candidate),
    ):
        mean = sum(arm) / sum(losses.tokens)
        if mean < 700:
            yield path, value, math.exp(mean), "sample_losses"


_MAY_BE_NAN = {
    f"$.accuracy.{place.value}" for one in FIGURES if one.may_be_nan for place in one.places
}


def _not_numbers(value: Any, path: str) -> Iterator[str]:
    """The JSON paths of all NaN, but those of what is one where all texts are alike."""
    if isinstance(value, float) and math.isnan(value) and path not in _MAY_BE_NAN:
        yield path
    parts = value.items() if isinstance(value, dict) else ()
    for name, part in parts:
        yield from _not_numbers(part, f"{path}.{name}")
    for number, part in enumerate(value if isinstance(value, (list, tuple)) else ()):
        yield from _not_numbers(part, f"{path}[{number}]")
