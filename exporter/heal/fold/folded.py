"""From a cut to one whose kept products make up for it, held against the bare cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from exporter.errors import HealingError
from exporter.heal.fit import tell_if_few
from exporter.heal.fitting import Fitting, Made
from exporter.heal.fold.memory import refuse_short_memory
from exporter.heal.fold.places import Place, places_of
from exporter.heal.fold.refit import refitted
from exporter.heal.fold.writers import writers_of
from exporter.models.ablation.branch_replacements import NOTHING
from exporter.models.ablation.embeddings import meter_of
from exporter.models.anatomy.architectures import layer_modules
from exporter.models.anatomy.residual_stream import LayerModules
from exporter.models.changed_weights import OwnValue, changes_of, refuse_quantized, swapped
from exporter.models.texts.calibration import CalibrationText

_WAY_OUT = "Use separate maps: --heal linear."


@contextlib.contextmanager
def folded(fitting: Fitting) -> Iterator[Made]:
    """Folds what is lost into kept products; the model is as before afterwards.

    One half of the held-out samples tells whether the fold is better than the bare cut; the other
    is for those who judge.

    Args:
        fitting: The model, the branches, the texts and the options.

    Yields:
        The changed weights, and a way to run the model with them, while the block runs.

    Raises:
        HealingError: The weights are quantised, there is no product to fold into, or nothing was
            gained.
    """
    deciding, judging = fitting.texts.halves
    values = folded_values(fitting, fitting.texts.fitting)
    tell_if_few(fitting.texts.fitting, fitting.loaded, fitting.progress)
    _refuse_loss(fitting, deciding, values)
    yield Made(
        judging,
        dict.fromkeys(fitting.names, NOTHING),
        weights=changes_of(values),
        deciding=deciding,
        within=lambda: swapped(values),
    )


def folded_values(fitting: Fitting, text: CalibrationText) -> list[OwnValue]:
    """The new values of products, fitted on a text; the model is as before afterwards.

    Raises:
        HealingError: The weights are quantised, there is no product to fold into, or memory is
            short.
    """
    model, options = fitting.loaded.model, fitting.options
    refuse_quantized(model)
    refuse_short_memory(model, options, fitting.names)
    layers = layer_modules(model)
    places = _places(fitting, layers)
    writers = writers_of(model, layers, fitting.names, places)
    if not writers:
        fitting.progress.detail(
            "heal: no factors for the hidden states: the embedding or a branch shares its weight"
        )
    return refitted(
        model,
        text,
        layers,
        fitting.names,
        places,
        writers=writers,
        ridge=options.ridge,
        batch_size=options.batch_size,
        progress=fitting.progress,
    )


def _places(fitting: Fitting, layers: Sequence[LayerModules]) -> list[Place]:
    """The products to fold into; says which kept branches have none.

    Raises:
        HealingError: There is none.
    """
    model = fitting.loaded.model
    if layers[0].form == "post_norm":
        raise HealingError(
            f"In {type(model).__name__} a norm follows each sum, so a map of the stream can't "
            "be added to a weight.",
            _WAY_OUT,
            code="fold-behind-norm",
        )
    places, without = places_of(model, layers, fitting.names)
    if not places:
        raise HealingError(
            f"{type(model).__name__} has no kept branch before a gap, or behind it, that ends in a "
            "product of its own: a norm or experts stand there, other modules read its weight, or "
            "nothing is kept.",
            _WAY_OUT,
            code="nothing-to-fold-into",
        )
    if without:
        named = ", ".join(f"{ref.kind} {ref.layer}" for ref in without)
        fitting.progress.say(f"heal: {named}: no weight of their own to fold into")
    return places


def _refuse_loss(fitting: Fitting, text: CalibrationText, values: Sequence[OwnValue]) -> None:
    """Refuses a fold that is no better than the bare cut on text that it wasn't fitted on.

    Raises:
        HealingError: It is not, or no product was changed.
    """
    if not values or _loses(fitting, text, values):
        raise HealingError(
            f"Folding gained nothing on held-out text of {text.ref.source}.",
            "Give more calibration text (--samples), or heal with --heal linear or distill.",
            code="folding-gained-nothing",
        )


def _loses(fitting: Fitting, text: CalibrationText, values: Sequence[OwnValue]) -> bool:
    cut: Any = dict.fromkeys(fitting.names, NOTHING)
    size = fitting.options.batch_size
    meter = meter_of(fitting.loaded.model, text.input_ids, text.mask, batch_size=size)
    healed = meter.inside(lambda: swapped(values))
    bare, found = (each.measure(cut, fitting.progress).distance for each in (meter, healed))
    return found >= bare
