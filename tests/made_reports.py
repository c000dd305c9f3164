"""Reports with chosen times, and ones with every field filled, of any size, from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exporter.artifacts import (
    CUT,
    Accuracy,
    Arm,
    Arms,
    CalibrationRef,
    ComparisonReport,
    Corner,
    EngineFacts,
    Environment,
    FormRecord,
    HealedBranch,
    HealedFigure,
    HealedText,
    Healing,
    ImportanceReport,
    Interval,
    JudgedText,
    LatencyRow,
    LatencySamples,
    MachineState,
    ModelRef,
    ParityCheck,
    PerplexityPair,
    PlannedDeletion,
    PlanParts,
    QuantizationRecord,
    SampleAnswer,
    SampleAnswers,
    Score,
    Speedup,
    TaskResult,
)
from exporter.compare.timing.statistics import summarize
from exporter.report.files import page
from exporter.report.markdown import markdown
from exporter.report.sections import comparison_document
from exporter.report.terminal import comparison_grids, plain_text

LENGTHS = (128, 512)
_MODEL_SIZES = {
    "file_bytes": 542_600_000, "parameters": 134_515_008, "nodes": 2245,
    "kv_cache_bytes_per_token": 46080,
}  # fmt: skip
_PHASES: tuple[Any, ...] = ("prefill", "decode", "first_token", "per_token", "generate")
_STOPS: tuple[Any, ...] = ("narrow", "budget", "rounds")
_WORDS: tuple[Any, ...] = ("faster", "same", "inconclusive", "slower")


def as_markdown(report: ComparisonReport) -> str:
    return markdown(comparison_document(report))


def as_page(report: ComparisonReport) -> str:
    return page(comparison_document(report))


def as_text(report: ComparisonReport) -> str:
    return plain_text(comparison_grids(report))


def samples(median_ms: float, count: int = 24) -> LatencySamples:
    """Times that are all the same, of which the slow ones are said to be slower."""
    return LatencySamples(
        median_ms=median_ms,
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
    values: dict[str, Any] = {
        "phase": "prefill",
        "batch": 1,
        "sequence_length": length,
        "past_length": 0,
        "rounds": rounds,
        "baseline": samples(baseline_ms, 2 * rounds),
        "candidate": samples(candidate_ms, 2 * rounds),
        "speedup": Speedup(ratio=ratio, ci95=(ratio / (1 + width), ratio * (1 + width))),
        "verdict": "faster",
        "noise_floor": noise,
    }
    return LatencyRow(**{**values, **changes})


def gate_arm(name: str, **changes: Any) -> Arm:
    """An arm of a small model, whose hash follows from its name."""
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


def arms_of(candidate: str, **changes: Any) -> Arms:
    """The base, and a candidate of this name."""
    return Arms(baseline=gate_arm("base"), candidate=gate_arm(candidate, **changes))


def made_environment(machine: str = "Test CPU", **changes: Any) -> Environment:
    """A machine of two cores."""
    values: dict[str, Any] = {
        "machine": "x86_64",
        "processor": machine,
        "cpu_count": 2,
        "threads": 2,
        "memory_bytes": 8 << 30,
        "platform": "Linux",
        "python": "3.11.2",
    }
    return Environment(**{**values, **changes})


def model_arm(name: str, **changes: Any) -> Arm:
    """An arm of SmolLM2-135M's size."""
    return gate_arm(name, **{**_MODEL_SIZES, **changes})


def narrow(value: float, reach: float = 0.001) -> Interval:
    """An estimate that is known well."""
    return Interval(value=value, ci95=(value - reach, value + reach))


def made_engine(size: int = 9, **changes: Any) -> EngineFacts:
    """What is known of an engine of this many bytes."""
    values: dict[str, Any] = {
        "path": "e", "sha256": "9" * 64, "engine_bytes": size, "backend": "tensorrt",
        "backend_version": "11", "built_for": "sm90", "precision": "fp32",
        "memory_bytes": {"activation": 9},
    }  # fmt: skip
    return EngineFacts(**{**values, **changes})


def gate_accuracy(candidate: float = 20.0, **changes: Any) -> Accuracy:
    """What language models are judged by, known well; the baseline's perplexity is 16.

    Figures and intervals are called as in files of earlier versions.
    """
    increase = math.log(candidate / 16)
    values: dict[str, Any] = {
        "text_source": "text",
        "text_sha256": "e" * 64,
        "tokens": 4096,
        "perplexity": PerplexityPair(baseline=16.0, candidate=candidate),
        "log_perplexity_increase": narrow(increase) if math.isfinite(increase) else None,
        "kl_divergence": 0.2,
        "kl_interval": narrow(0.2),
        "top1_agreement": 0.8,
        "top1_interval": narrow(0.8),
    }
    return Accuracy(**{**values, **changes})


def gate_report(
    rows: Sequence[LatencyRow] | None = None, *, machine: str = "Test CPU", **changes: Any
) -> ComparisonReport:
    """A report as `depthcut compare` writes it, with rows of chosen times."""
    values: dict[str, Any] = {
        "versions": {"depthcut": "0.1.0", "onnxruntime": "1.32.0", "torch": "2.13"},
        "command": ["depthcut", "compare", "base", "cand", "-o", "out"],
        "environment": made_environment(machine),
        "arms": arms_of("cand"),
        "parity": [],
        "latency": [gate_row(n) for n in LENGTHS] if rows is None else list(rows),
        "accuracy": gate_accuracy(),
    }
    return ComparisonReport(**{**values, **changes})


def full_report(
    *, layers: int = 30, rows: int = 5, samples: int = 200, text: str = "wikitext-2", seed: int = 0
) -> ComparisonReport:
    """A report that leaves nothing out."""
    random = np.random.default_rng(seed)
    latency = [_row(random, index, samples, text) for index in range(rows)]
    return ComparisonReport(
        versions={"depthcut": "0.1.0", "onnxruntime": "1.32.0", text: "1"},
        command=["depthcut", "compare", text, "candidate", "-o", "out"],
        environment=_environment(text),
        arms=_arms(text),
        plan=_plan(layers),
        calibration=CalibrationRef(
            source=f"{text} (calibration)", samples=20, sequence_length=512, tokens=10240,
            sha256="c" * 64,
        ),
        parts=made_parts(text),
        parity=[
            ParityCheck(name=f"logits, {text}", phase="prefill", max_abs_error=4e-5, tolerance=3e-3,
                        passed=True),
            ParityCheck(name="keys", phase="decode", max_abs_error=1.0, tolerance=3e-3,
                        passed=False),
        ],
        latency=latency,
        accuracy=_accuracy(random, text),
        corners=_corners(latency),
        healing=_healing(text),
    )  # fmt: skip


def made_parts(text: str) -> PlanParts:
    """What a plan was made by: a mixture, of which it tells each text apart."""
    refs = [
        CalibrationRef(
            source=f"{text} ({name})", samples=9, sequence_length=512, tokens=4608, sha256="f" * 64
        )
        for name in ("searched", "searched too")
    ]
    figures = {"kl": 0.2, "log_perplexity_increase": 0.1, "top1_agreement": 0.8}
    apart = [JudgedText(text=ref, figures=figures) for ref in refs]
    return PlanParts(chosen_on=refs, stopped_on=refs, judged_on=refs, judged_apart=apart)


def _healing(text: str) -> Healing:
    ref = CalibrationRef(
        source=f"{text} (fitted)", samples=20, sequence_length=512, tokens=10240, sha256="d" * 64
    )
    figures = {
        "log_perplexity_increase": HealedFigure(dropped=0.6, healed=0.2, std_errors=(0.02, 0.02)),
        "kl": HealedFigure(dropped=0.6, healed=0.2, std_errors=(0.01, 0.01)),
        "top1_agreement": HealedFigure(dropped=0.7, healed=0.7),
    }
    roles: tuple[Any, ...] = ("calibration", "other")
    texts = [
        HealedText(
            role=role, text=ref, figures=figures, gain=0.4, gain_std_error=0.02,
            perplexities=(30.0, 30 * np.exp(0.6), 30 * np.exp(0.2)),
        )
        for role in roles
    ]  # fmt: skip
    branch = HealedBranch(
        layer=20, kind="attention", replacement="linear", parameters=332_352,
    )  # fmt: skip
    return Healing(
        asked="best", rank=None, calibration=[ref], branches=[branch],
        parameters=332_352, texts=texts, warnings=[f"The domains disagree: {text}."],
    )  # fmt: skip


def importance_of(scores: Mapping[str, Sequence[float]], source: str = "m") -> ImportanceReport:
    """Cosine scores of a model, by kind those of its layers."""
    count = len(next(iter(scores.values())))
    return ImportanceReport(
        model=ModelRef(source=source, architecture="X", num_layers=count, sha256="0" * 64),
        metric="cosine",
        calibration=CalibrationRef(
            source="pydoc", samples=8, sequence_length=8, tokens=64, sha256="1" * 64
        ),
        scores=[
            Score(layer=layer, kind=kind, score=value, std_error=None)  # type: ignore[arg-type]
            for kind, values in scores.items()
            for layer, value in enumerate(values)
        ],
    )


def full_importance(*, layers: int = 30, text: str = "model", seed: int = 0) -> ImportanceReport:
    """Scores of every attention, MLP and block."""
    random = np.random.default_rng(seed)
    return ImportanceReport(
        model=ModelRef(source=text, architecture=text, num_layers=layers, sha256="a" * 64),
        metric=f"cosine {text}",
        calibration=CalibrationRef(
            source=text, samples=1, sequence_length=2, tokens=2, sha256="c" * 64
        ),
        scores=[
            Score(layer=layer, kind=kind, score=float(random.lognormal(-4, 1)), std_error=0.001)
            for layer in range(layers)
            for kind in ("attention", "mlp", "block")
        ],
    )


def _plan(layers: int) -> list[PlannedDeletion]:
    places: tuple[Any, ...] = ("none", "linear", "bias")
    cut = [PlannedDeletion(layer=n, kind="attention") for n in range(2, layers - 1, 3)]
    cut += [
        PlannedDeletion(layer=n, kind="mlp", replacement=places[n % 3])
        for n in range(layers // 2, layers - 1, 5)
    ]
    return [*cut, PlannedDeletion(layer=layers - 1, kind="block")]


def _row(random: np.random.Generator, index: int, samples: int, text: str) -> LatencyRow:
    ratio = (1.12, 1.0, 1.02, 0.93)[index % 4] * (1 + 0.01 * (index // 4))
    middle = float(random.uniform(5, 90))
    baseline = middle * ratio * random.lognormal(0, 0.06, samples)
    baseline[:: max(7, samples // 9)] *= 2.4
    phase = _PHASES[index % len(_PHASES)]
    return LatencyRow(
        phase=phase,
        batch=1 + index // 5,
        sequence_length=1 if phase == "decode" else 128 << index % 4,
        past_length=512 if phase == "decode" else 0,
        new_tokens=64 if phase in ("first_token", "per_token", "generate") else 0,
        rounds=12,
        baseline=summarize(baseline),
        candidate=summarize(middle * random.lognormal(0, 0.06, samples)),
        references={
            "float baseline": summarize(middle * 3.1 * random.lognormal(0, 0.06, samples)),
            "float candidate": summarize(middle * 2.6 * random.lognormal(0, 0.06, samples)),
            f"PyTorch eager {text}": summarize(middle * 1.5 * random.lognormal(0, 0.1, samples)),
        },
        speedup=Speedup(ratio=ratio, ci95=(ratio - 0.02, ratio + 0.015)),
        verdict=_WORDS[index % 4],
        noise_floor=None if index == 1 else 1.013,
        stopped=_STOPS[index % 3],
        settled=index != 2,
        clock="device" if index == 3 else "host",
    )  # fmt: skip


def _accuracy(random: np.random.Generator, text: str) -> Accuracy:
    return Accuracy(
        text_source=text, text_sha256="e" * 64, tokens=8192,
        perplexity=PerplexityPair(baseline=16.05, candidate=17.79),
        kl_divergence=0.166, top1_agreement=0.841, prompts=40,
        intervals={
            "perplexity": Interval(value=0.103, ci95=(0.091, 0.116)),
            "kl_divergence": Interval(value=0.166, ci95=(0.151, 0.182)),
        },
        figures={
            "exact_match": 0.25, "embedding_cosine": 0.9812, "lowest_cosine": 0.941,
            "rank_agreement": 0.967,
        },
        tasks=[
            TaskResult(task=name, metric="acc", items=500, baseline=0.41, candidate=0.41 + shift,
                       difference=Interval(value=shift, ci95=(shift - 0.02, shift + 0.02)),
                       source=f"{name}.jsonl", higher_is_better=name != "piqa")
            for name, shift in (("arc_easy", -0.04), (f"hellaswag {text}", 0.005), ("piqa", 0.03))
        ],
        answers=SampleAnswers(
            source=text, chat=True, new_tokens=40,
            answers=[SampleAnswer(prompt=f"What is {n}? {text}",
                                  baseline=f"It is {n}. {text}",
                                  candidate=text * n + CUT * (n == 1)) for n in range(4)],
        ),
    )  # fmt: skip


def _arms(text: str) -> Arms:
    engine = made_engine(
        270_000_000, path=f"/out/{text}-sm89.engine", backend="tensorrt-rtx",
        backend_version="1.7.1", built_for="sm89, sm120", precision="bf16",
        memory_bytes={"weights": 268_000_000},
    )  # fmt: skip
    form = FormRecord(
        target="onnxruntime-cpu", writer=f"genai {text}", passes=["fused norms"],
        fused={"GroupQueryAttention": 30, text: 60}, remark=f"Nothing faster for {text}.",
    )  # fmt: skip
    quantized: dict[str, Any] = {
        "form": form, "file_bytes": 142_000_000,
        "quantization": QuantizationRecord(
            scheme="int8", method="rtn", bits={"8": 211}, block_size=32, symmetric=True,
            accuracy_level=4, embedding_bits=8, head_bits=8, calibration=text,
        ),
    }  # fmt: skip
    smaller: dict[str, Any] = {
        "parameters": 120_000_000, "nodes": 1773, "kv_cache_bytes_per_token": 33792,
    }  # fmt: skip
    return Arms(
        baseline=model_arm("b", **quantized, path=f"{text}/model.onnx", engines=[engine, engine]),
        candidate=model_arm(
            "b", path="candidate/model.onnx", engines=[engine],
            **{**quantized, **smaller, "file_bytes": 125_000_000},
        ),
        references={
            "float baseline": model_arm("b", form=form, path=f"{text}/float.onnx"),
            "float candidate": model_arm(
                "b", **smaller, path="candidate/float.onnx", file_bytes=480_000_000
            ),
            f"PyTorch eager {text}": model_arm(
                "b", backend="pytorch", path="hf/", not_run=f"no NVIDIA driver {text}",
                device_memory_bytes=2_000_000_000,
            )
        },
    )  # fmt: skip


def _corners(rows: list[LatencyRow]) -> list[Corner]:
    """Of the four, with the speedups that the medians say."""

    def corner(arm: str, gain: float, **figures: float) -> Corner:
        speedups = {
            row.shape_name: Interval(value=gain, ci95=(gain - 0.04, gain + 0.05)) for row in rows
        }
        whole = arm.replace("candidate", "baseline")
        results: dict[str, Any] = {} if arm == whole else {
            "whole": whole, "over_whole": speedups,
            "verdicts": dict.fromkeys(speedups, "faster"),
            "rises": {"perplexity": Interval(value=0.1, ci95=(0.05, 0.15))},
        }  # fmt: skip
        return Corner(
            arm=arm, pruned="candidate" in arm, quantized="float" not in arm, figures=figures,
            speedups={} if arm == "float baseline" else speedups, **results,
        )  # fmt: skip

    return [
        corner("float baseline", 1.0, perplexity=16.05),
        corner("float candidate", 1.19, perplexity=17.71, kl_divergence=0.15,
               top1_agreement=0.85, exact_match=0.25, embedding_cosine=0.98),
        corner("baseline", 2.77, perplexity=16.2, kl_divergence=0.01,
               top1_agreement=0.96, exact_match=0.75, embedding_cosine=0.99),
        corner("candidate", 3.1, perplexity=17.9, kl_divergence=0.17,
               top1_agreement=0.84, exact_match=0.125, embedding_cosine=0.97),
    ]  # fmt: skip


def _environment(text: str) -> Environment:
    return made_environment(
        f"Test CPU {text}", gpu=text, other_cpu_share=0.13, affinity=[0, 1],
        states=[
            MachineState(throttled=n == 2)
            for n in range(3)
        ],
    )  # fmt: skip
