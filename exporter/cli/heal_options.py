"""The options that say how a plan is healed, alike in `depthcut heal` and `depthcut export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.cli.sections import Count, option_in

if TYPE_CHECKING:
    from exporter.heal.options import HealOptions

_F = TypeVar("_F", bound=Callable[..., Any])

# As exporter.artifacts.HealKind, which --help must not load.
KINDS = click.Choice(["bias", "linear", "best"])
healing = option_in("How the plan is healed")
_OPTIONS = ("rank", "ridge", "sequential", "check_text")


def heal_options(prefix: str = "") -> Callable[[_F], _F]:
    """Adds what says how replacements are fitted.

    Args:
        prefix: Begins the options' names, such as ``heal-``.
    """
    options = (
        healing(
            f"--{prefix}check-text", metavar="SOURCE",
            help="Text of another domain, on which the gain is measured too. [pydoc, or self when "
            "calibrated on pydoc]",
        ),
        healing(
            f"--{prefix}sequential/--{prefix}independent", default=None,
            help="Fit each replacement on the already healed model below it, or each alone on the "
            "whole model. [independent]",
        ),
        healing(
            f"--{prefix}ridge", type=float, metavar="X",
            help="Ridge of the linear maps, relative to the mean eigenvalue of what a branch reads."
            " [chosen for each branch on held-out tokens]",
        ),
        healing(
            f"--{prefix}rank", type=Count(),
            help="Fit linear maps of this rank, kept as two factors. [full]",
        ),
    )  # fmt: skip

    def add(function: _F) -> _F:
        for option in options:
            function = option(function)
        return function

    return add


def heal_request(
    kind: str | None,
    options: Mapping[str, Any],
    *,
    calibration: tuple[str, ...],
    prefix: str = "",
) -> HealOptions | None:
    """The options as the library takes them; None where no healing is asked for.

    Args:
        kind: What is asked for.
        options: As click gives them, those of scoring among them.
        calibration: The texts to fit on; empty: the default.
        prefix: Begins the names of the options that are only for healing, such as ``heal_``.

    Raises:
        UsageError: Something is said of a healing that nobody asked for.
    """
    from exporter.errors import UsageError
    from exporter.heal.options import HealOptions

    given = {name: options[f"{prefix}{name}"] for name in _OPTIONS}
    if kind is None:
        for name, value in given.items():
            if value is not None:
                option = f"--{prefix}{name}".replace("_", "-")
                raise UsageError(f"{option} is for healing.", "Say what to put in with --heal.")
        return None
    given["sequential"] = bool(given["sequential"])
    names = ("samples", "sequence_length", "batch_size", "seed")
    shared = {name: options[name] for name in names}
    return HealOptions(kind=kind, calibration=calibration, **given, **shared)  # type: ignore[arg-type]
