"""Tiny models that are trained, their texts, and what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.artifacts import CalibrationRef
from exporter.heal.distill.student import Student
from exporter.heal.fit import Fitting
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET
from graph_passes.types import SublayerRef

DROPPED = [SublayerRef(1, "attention"), SublayerRef(2, "mlp")]
IDS = torch.arange(3, 19)[None]
RATES = {"adapters": 0.01, "all": 0.002}


def text(samples: int = 24, length: int = 16, seed: int = 0) -> CalibrationText:
    ids = np.random.default_rng(seed).integers(3, 60, (samples, length))
    ref = CalibrationRef(
        source=f"test {seed}", samples=samples, sequence_length=length, tokens=ids.size,
        sha256=f"{seed}" * 64,
    )  # fmt: skip
    return CalibrationText(ref, ids, np.ones(ids.shape, dtype=np.bool_))


def fitting(loaded: Any, work: Path | None = None, **options: Any) -> Fitting:
    usual = {"kind": "distill", "tokens": 12 * 64, "step_tokens": 64, "sequence_length": 16}
    rate = {"learning_rate": RATES[options.get("train", "adapters")]}
    heal_options = HealOptions(**usual | rate | options)
    first = text()
    texts = HealingTexts(first, (first.ref,), (text(8, seed=1),), None)
    return Fitting(loaded, texts, DROPPED, heal_options, work, QUIET)


def answer(model: Any) -> Any:
    with torch.inference_mode():
        result = model(IDS)
        return (result.logits if hasattr(result, "logits") else result[0]).clone()


def student_of(loaded: Any, train: Any = "adapters") -> Student:
    torch.manual_seed(0)
    return Student(loaded.model, dict.fromkeys(DROPPED, NOTHING), train, 4)
