"""From a cut to a trained one: where it is trained, on which texts, and what is kept of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from exporter.artifacts.store import Store
from exporter.errors import HealingError, ScoringError
from exporter.heal.distill.student import Student, trained_numbers
from exporter.heal.distill.training import Trainer
from exporter.heal.distill.workers import Workers
from exporter.heal.fit import Fit
from exporter.heal.fitting import Fitting, Made
from exporter.heal.folded import folded_values
from exporter.heal.memory import telling_memory, training_device
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacements
from exporter.models.changed_weights import OwnValue, bfloat16_where_fast, weights_changed
from exporter.models.texts.calibration import DEFAULT_TOKENS, CalibrationText
from exporter.models.texts.mixtures import joined
from graph_passes.types import SublayerRef


@contextlib.contextmanager
def distilled(fitting: Fitting) -> Iterator[Made]:
    """Trains the cut model to answer as the whole one does; the model is as before afterwards.

    One half of the held-out samples decides when to stop and which state is kept; the other is for
    those who judge.
    """
    loaded, options = fitting.loaded, fitting.options
    stopping, judging = fitting.texts.halves
    trained = trained_numbers(loaded.model, fitting.names, options.train, options.used_rank)
    fitting.progress.say(f"heal: {trained / 1e6:.1f} million numbers are trained ({options.train})")
    cut, fits = _replaced(fitting)
    begun = _folded(fitting) if options.begins_folded else []
    model: Any = loaded.model
    own = model.device
    with contextlib.ExitStack() as stack:
        stack.callback(model.to, own)
        with telling_memory(options):
            model.to(training_device(model))
            for value in begun:
                value.other = value.other.to(model.device)
        with torch.random.fork_rng(devices=[]), telling_memory(options):
            torch.manual_seed(options.seed)
            student = Student(model, cut, options.train, options.used_rank, begun)
        stack.callback(student.close)
        made_from = _made_from(fitting, stopping.ids_sha256)
        store = None if fitting.work is None else Store(fitting.work / "distill.jsonl", made_from)
        # Nothing holds the trainer: what it keeps is gone before the healed cut is measured.
        training = Trainer(
            student, fitting.texts.fitting, stopping, options, store, fitting.progress
        ).run()
        changes = student.changes()
        student.close()  # what is judged is what is written: merged, in the model's own type
        yield Made(
            judging,
            student.branch_replacements(),
            fits,
            weights=changes,
            deciding=stopping,
            training=training,
            within=partial(weights_changed, model, changes),
        )


def _replaced(fitting: Fitting) -> tuple[BranchReplacements, Mapping[SublayerRef, Fit]]:
    """What takes the branches' places, and is trained too; nothing, unless it is asked for."""
    if fitting.options.replacements == "none":
        return dict.fromkeys(fitting.names, NOTHING), {}
    texts = replace(fitting.texts, fitting=_few(fitting, _TOKENS_OF_MAPS))
    return replace(fitting, texts=texts).alike(fitting.options.replacements)


def _few(fitting: Fitting, tokens: int) -> CalibrationText:
    """Text to fit on before the training: about so many tokens, or twice as many.

    Each text of a mixture is thinned by itself: its samples stand at regular places in the mixture.
    """
    text = fitting.texts.fitting
    every = slice(None, None, max(1, text.ref.tokens // tokens))
    return joined([calibration_text.rows(every) for calibration_text in text.apart])


def _folded(fitting: Fitting) -> list[OwnValue]:
    """The weights to begin with, folded by the first process; none if that can't be done."""
    parameters = dict(fitting.loaded.model.named_parameters())
    result = Workers().once(
        lambda: {own_value.name: own_value.other.cpu() for own_value in _fold(fitting)}
    )
    return [OwnValue(name, parameters[name], value) for name, value in result.items()]


def _fold(fitting: Fitting) -> list[OwnValue]:
    """The weights, folded on about as much text as a fold alone reads; none if they can't be."""
    fast = bfloat16_where_fast(fitting.loaded.model.device)
    try:
        with telling_memory(fitting.options), fast:
            return folded_values(fitting, _few(fitting, DEFAULT_TOKENS))
    except (HealingError, ScoringError) as error:
        fitting.progress.say(
            f"heal: {error.message} The training begins with the model's own weights; "
            "replacements: linear may begin nearer."
        )
        return []


_TOKENS_OF_MAPS = 30_000
"""A map of the stream has as many inputs as the stream is wide; a fold blends what is there."""
_FREE = ("check_text", "time_s")
"""Options that may differ where a training goes on."""


def _made_from(fitting: Fitting, stopping_sha256: str) -> Mapping[str, object]:
    """All that a state of the training hangs on."""
    result = vars(fitting.options)
    return {
        **fitting.loaded.identity(),
        "branches": [str(name) for name in fitting.names],
        "begins": f"folded on {DEFAULT_TOKENS}, replaced on {_TOKENS_OF_MAPS} tokens or more",
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "text": fitting.texts.fitting.ids_sha256,
        "stopping": stopping_sha256,
        "options": {name: result[name] for name in sorted(result) if name not in _FREE},
    }
