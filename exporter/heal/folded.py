"""From a cut to one whose kept products make up for it, held against the bare cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from exporter.errors import HealingError
from exporter.heal.fit import Fit, tell_if_few
from exporter.heal.fitting import Fitting, Made
from exporter.heal.fold_places import Place, places_of
from exporter.heal.refit import refitted
from exporter.models.ablation.branch_replacements import (
    NOTHING,
    BranchReplacement,
    BranchReplacements,
)
from exporter.models.architectures import layer_modules
from exporter.models.changed_weights import OwnValue, changes_of, refuse_quantized, swapped
from exporter.models.residual_stream import LayerModules
from exporter.models.tasks import meter_here
from exporter.models.texts.calibration import CalibrationText
from graph_passes.types import SublayerRef

_WAY_OUT = "Use separate maps: --heal linear, or replacements: linear in a --config file."


@contextlib.contextmanager
def folded(fitting: Fitting) -> Iterator[Made]:
    """Folds what is lost into kept products; the model is as before afterwards.

    Where no weight precedes a gap that could be fitted anew, ``options.replacements`` take the
    branches' places. One half of the held-out samples tells whether the result is better than the
    bare cut; the other is for those who judge.
    """
    deciding, judging = fitting.texts.halves
    replaced, fits = _replaced(fitting)
    values = folded_values(fitting, fitting.texts.fitting, replaced)
    tell_if_few(fitting.texts.fitting, fitting.loaded, fitting.progress)
    _refuse_loss(fitting, deciding, replaced, values)
    yield Made(
        judging,
        replaced,
        fits,
        weights=changes_of(values),
        deciding=deciding,
        within=lambda: swapped(values),
    )


def folded_values(
    fitting: Fitting, text: CalibrationText, replaced: BranchReplacements | None = None
) -> list[OwnValue]:
    """The new values of products, fitted on a text; the model is as before afterwards."""
    model, options = fitting.loaded.model, fitting.options
    refuse_quantized(model)
    layers = layer_modules(model)
    places = _places(fitting, layers)
    if not places:
        return []
    return refitted(
        model,
        text,
        layers,
        replaced or dict.fromkeys(fitting.names, NOTHING),
        places,
        ridge=options.ridge,
        batch_size=options.batch_size,
        progress=fitting.progress,
    )


def _replaced(
    fitting: Fitting,
) -> tuple[dict[SublayerRef, BranchReplacement], Mapping[SublayerRef, Fit]]:
    """What takes the places of branches that no product before them makes up for, if asked for."""
    kind, layers = fitting.options.replacements, layer_modules(fitting.loaded.model)
    replacements: dict[SublayerRef, BranchReplacement] = dict.fromkeys(fitting.names, NOTHING)
    if kind == "none":
        return replacements, {}
    places, _ = _places_of(fitting, layers)
    without = [ref for ref in fitting.names if all(ref not in place.gap for place in places)]
    if not without:
        return replacements, {}
    replaced, fits = replace(fitting, names=without).alike(kind)
    for ref in without:
        what = "nothing" if replaced[ref] is NOTHING else kind
        fitting.progress.say(f"heal: {ref}: no weight to fold into; in its place: {what}")
    return replacements | replaced, fits


def _places_of(
    fitting: Fitting, layers: Sequence[LayerModules]
) -> tuple[list[Place], list[SublayerRef]]:
    """As :func:`places_of`; none where a norm follows each sum."""
    if layers[0].form == "post_norm":
        return [], []
    return places_of(fitting.loaded.model, layers, fitting.names)


def _places(fitting: Fitting, layers: Sequence[LayerModules]) -> list[Place]:
    """The products to fold into; says which kept branches have none."""
    places, without = _places_of(fitting, layers)
    if not places and fitting.options.replacements == "none":
        raise _nowhere(type(fitting.loaded.model).__name__, layers[0].form)
    if without:
        named = ", ".join(f"{ref.kind} {ref.layer}" for ref in without)
        fitting.progress.say(f"heal: {named}: no weight of their own to fold into")
    return places


def _nowhere(model: str, form: str) -> HealingError:
    if form == "post_norm":
        return HealingError(
            f"In {model} a norm follows each sum, so a map of the stream can't be added to a "
            "weight.",
            _WAY_OUT,
            code="fold-behind-norm",
        )
    return HealingError(
        f"{model} has no kept branch before a gap, or behind it, that ends in a product of its "
        "own: a norm or experts stand there, other modules read its weight, or nothing is kept.",
        _WAY_OUT,
        code="nothing-to-fold-into",
    )


def _refuse_loss(
    fitting: Fitting,
    text: CalibrationText,
    replaced: BranchReplacements,
    values: Sequence[OwnValue],
) -> None:
    """Refuses a fold that is no better than the bare cut on text that it wasn't fitted on."""
    changed = values or any(what is not NOTHING for what in replaced.values())
    if not changed or _loses(fitting, text, replaced, values):
        raise HealingError(
            f"Folding gained nothing on held-out samples of {text.ref.source}.",
            "Give more to calibrate on (--samples), or heal with --heal linear or distill.",
            code="folding-gained-nothing",
        )


def _loses(
    fitting: Fitting,
    text: CalibrationText,
    replaced: BranchReplacements,
    values: Sequence[OwnValue],
) -> bool:
    cut: Any = dict.fromkeys(fitting.names, NOTHING)
    size = fitting.options.batch_size
    meter = meter_here(fitting.loaded, text, size, positions=1)
    bare = meter.measure(cut, fitting.progress)
    result = meter.inside(lambda: swapped(values)).measure(replaced, fitting.progress)
    return bool(result.distance >= bare.distance)
