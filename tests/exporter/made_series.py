"""Score files of series: one model over training, one over texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.artifacts import CalibrationRef, ImportanceReport, ModelRef, Score

FIRST = [0.9, 0.2, 0.1, 0.4, 0.5, 0.3]
SECOND = [0.8, 0.1, 0.2, 0.3, 0.6, 0.4]
THIRD = [0.7, 0.1, 0.2, 0.4, 0.5, 0.3]


def scores_of(
    values: Sequence[float], kind: Any = "attention", std_error: float | None = None
) -> list[Score]:
    return [Score(layer=n, kind=kind, score=v, std_error=std_error) for n, v in enumerate(values)]


def write_scores(
    path: Path,
    values: Sequence[float],
    *,
    model: str = "run/checkpoint-1",
    sha: str = "a",
    text: str = "pydoc (calibration half, Python 3.11)",
    samples: int = 4,
    architecture: str = "A",
    std_error: float | None = None,
) -> Path:
    """An importance.json; ``sha`` tells the models apart."""
    ref = CalibrationRef(
        source=text, samples=samples, sequence_length=8, tokens=8 * samples,
        sha256=f"{len(text):02x}" * 32,
    )  # fmt: skip
    mlp = [value * 2 for value in reversed(values)]
    return ImportanceReport(
        model=ModelRef(
            source=model, architecture=architecture, num_layers=len(values), sha256=sha * 64
        ),
        metric="cosine",
        calibration=ref,
        scores=[*scores_of(values, std_error=std_error), *scores_of(mlp, "mlp")],
    ).write(path)


def training(folder: Path) -> list[Path]:
    """Three checkpoints on one text, in the order of their steps."""
    return [
        write_scores(folder / f"{step}.json", values, model=f"run/checkpoint-{step}", sha=sha)
        for step, values, sha in ((200, FIRST, "a"), (1000, SECOND, "b"), (3000, THIRD, "c"))
    ]
