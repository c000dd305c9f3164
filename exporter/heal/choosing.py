"""For each branch the replacement that helps: nothing, a bias, or a linear map."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.heal.fits import Fit
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement
from exporter.models.ablation.meter import DamageMeter
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef


def by_explained(fits: Mapping[SublayerRef, Fit]) -> dict[SublayerRef, BranchReplacement]:
    """What explains most of each branch's output over held-out tokens; nothing where neither does.

    For models whose answers can't be compared, and as a first guess.
    """
    found = {}
    for name, fit in fits.items():
        options = [
            (0.0, NOTHING),
            (fit.bias_explained, fit.bias),
            (fit.linear_explained, fit.linear),
        ]
        found[name] = max(options, key=lambda option: option[0])[1]
    return found


def by_damage(
    meter: DamageMeter, fits: Mapping[SublayerRef, Fit], progress: Progress = QUIET
) -> dict[SublayerRef, BranchReplacement]:
    """What leaves the least KL divergence, branch after branch, the others as they stand.

    Begins with what :func:`by_explained` takes, and goes through the branches once, from the last
    layer down, so that each run begins as high as it can.

    Args:
        meter: Of the model, on samples that nothing was fitted on.
        fits: What may take each branch's place.
        progress: Told of every run.
    """
    current = by_explained(fits)
    with progress.task("choose replacements", total=len(fits)) as task:
        for name in sorted(fits, reverse=True):
            taken = current[name]
            options = [NOTHING, fits[name].bias, fits[name].linear]
            others = [one for one in options if one is not taken]
            cuts = [{**current, name: one} for one in others]
            damages = meter.measure_many(current, cuts)
            found = zip([taken, *others], damages, strict=True)
            # Of two that are equal the simpler one.
            best = min(found, key=lambda pair: (pair[1].kl, options.index(pair[0])))
            current[name] = best[0]
            task.advance()
    return current
