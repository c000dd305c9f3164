"""Which kind of healing a machine can afford: training, or replacements, which cost little."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from exporter.heal.distill.memory import needed_by
from exporter.heal.options import HealOptions
from exporter.models.loading.model_source import LoadedModel
from exporter.processes import available_bytes
from exporter.progress import QUIET, Progress

USUAL_TIME_S = 600.0
"""Of a training that nobody asked for."""
_FEWEST_TOKENS = 20_000
_RATES = {"cpu": 5e10, "cuda": 5e13}
"""Operations a second of a thread or a GPU; a machine with bfloat16 does twice as many."""
_OPERATIONS = 8
"""For each token and weight: both models forward, the student backward."""


def settled(options: HealOptions, loaded: LoadedModel, progress: Progress = QUIET) -> HealOptions:
    """The options with ``auto`` made one of the kinds.

    Args:
        options: How to heal.
        loaded: The model.
        progress: Told why nothing is trained, where that is so.
    """
    if options.kind != "auto":
        return options
    reason = _why_no_training(loaded.model, options)
    if reason is None:
        return replace(options, kind="distill", time_s=options.time_s or USUAL_TIME_S)
    progress.say(f"heal: {reason}, so replacements are fitted instead of a training")
    usual = HealOptions()
    trained = ("tokens", "time_s", "train", "learning_rate", "step_tokens", "states_weight")
    return replace(options, kind="best", **{name: getattr(usual, name) for name in trained})


def _why_no_training(model: Any, options: HealOptions) -> str | None:
    needed, available = needed_by(model, options), available_bytes()
    if available is not None and needed > available:
        return (
            f"training needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
        )
    seconds = options.time_s or USUAL_TIME_S
    tokens = seconds * _operations_per_second() / (_OPERATIONS * model.num_parameters())
    if tokens < _FEWEST_TOKENS:
        return f"about {tokens:,.0f} tokens could be trained on in {seconds / 60:.0f} minutes"
    return None


def _operations_per_second() -> float:
    import torch

    if torch.cuda.is_available():
        return _RATES["cuda"]
    return _RATES["cpu"] * torch.get_num_threads()
