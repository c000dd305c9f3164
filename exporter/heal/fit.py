"""Fits what takes each branch's place, each branch on its own, all in one pass over the text.

A branch adds y to the stream and reads x, behind its norm. The mean of y is its ``bias``; its
``linear`` is the ridge least-squares map from x to y. Only sums are kept, so memory depends on the
model's width and on how many branches are fitted at once, not on the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.heal import low_rank
from exporter.heal.activations import check_finite, held_out_tokens, observing
from exporter.heal.fits import Fit, FitStore
from exporter.heal.ridge import RIDGES, LinearMap, choose_ridge, explained, solve
from exporter.heal.statistics import Sums, sums_bytes
from exporter.models.ablation.branch_replacements import BranchReplacement
from exporter.models.anatomy.architectures import SublayerModules, every_sublayer, named_in
from exporter.models.anatomy.residual_stream import run_backbone
from exporter.models.loading.model_source import LoadedModel
from exporter.models.texts.batches import Batch
from exporter.models.texts.calibration import CalibrationText
from exporter.progress import QUIET, Progress
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch


MEMORY_LIMIT_BYTES = 4 << 30
_TOKENS_PER_INPUT = 4


def fit_branches(
    loaded: LoadedModel,
    text: CalibrationText,
    names: Iterable[SublayerRef] | None = None,
    *,
    rank: int | None = None,
    ridge: float | None = None,
    intercept: bool = True,
    batch_size: int = 4,
    held_out: float = 0.2,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    uses_maps: bool = True,
    store: FitStore | None = None,
    progress: Progress = QUIET,
) -> dict[SublayerRef, Fit]:
    """Fits a bias and a linear map for branches of the unchanged model.

    Args:
        loaded: The model.
        text: The calibration samples; padding is left out.
        names: The branches, by layer and kind; None: all.
        rank: Of the maps; None: full.
        ridge: Relative to the mean eigenvalue of a branch's inputs; None: chosen for each branch
            on held-out tokens.
        intercept: Whether maps may have one. Without, there are no biases either.
        batch_size: Samples in one forward pass.
        held_out: Share of the samples that a ridge is judged on. The maps that are returned are
            then fitted on all.
        memory_limit_bytes: For the sums. Where the branches need more, the text is run several
            times, for a group of layers each.
        uses_maps: Whether maps may be taken; for biases alone the tokens are never too few.
        store: Keeps what is finished; what is there of an earlier call is not fitted again.
        progress: Told of every sample, and when the tokens are few.

    Raises:
        HealingError: When activations are not finite (names layer and sample), the tokens are too
            few, or the rank does not exist.
        PlanError: When a branch does not exist.
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """
    parts = {part.ref: part for part in every_sublayer(loaded.model)}
    wanted = named_in(loaded.model, parts if names is None else names)
    later = HeldOut.of(text, held_out)
    found = {} if store is None else store.find(wanted, progress)
    left = [parts[name] for name in wanted if name not in found]
    for group in _groups(left, loaded, memory_limit_bytes):
        sums = _collected(loaded, text, later, group, batch_size, progress)
        for name in sorted(sums):
            found[name] = fitted(*sums.pop(name), rank=rank, ridge=ridge, intercept=intercept)
            if store is not None:
                store.keep(name, found[name])
    if uses_maps:
        tell_if_few(text, loaded, progress)
        tell_without_intercept(found.values(), progress)
    return {name: found[name] for name in sorted(found)}


def fitted(
    first: Sums,
    later: Sums,
    *,
    rank: int | None = None,
    ridge: float | None = None,
    intercept: bool = True,
) -> Fit:
    """The fit from a branch's sums.

    Args:
        first: Over the tokens to choose the ridge on.
        later: Over the held-out tokens.
        rank: Of the map; None: full.
        ridge: None: chosen on ``later``.
        intercept: Whether the map may have one; without, the bias is zero too.

    Raises:
        HealingError: As :func:`fit_branches`.
    """
    ridges = RIDGES if ridge is None else [ridge]
    with_intercept = None
    if not intercept:
        with_intercept = choose_ridge(first, later, ridges).linear_explained
        first.through_origin()
        later.through_origin()
    choice = choose_ridge(first, later, ridges)
    share = choice.linear_explained
    if rank is not None:
        share = explained(later, _map(first, choice.ridge, rank)[0])
    total = first.plus(later)
    found, maps = _map(total, choice.ridge, rank)
    return Fit(
        bias=BranchReplacement(total.y_mean.float().cpu()),
        linear=BranchReplacement(
            found.bias.float().cpu(), tuple(each.float().cpu() for each in maps)
        ),
        ridge=choice.ridge,
        bias_explained=choice.bias_explained,
        linear_explained=share,
        intercept_explained=with_intercept,
    )


def tell_without_intercept(fits: Iterable[Fit], progress: Progress) -> None:
    """Says what maps lose by having no intercept, as a mean over the branches."""
    pairs = [
        (fit.linear_explained, fit.intercept_explained)
        for fit in fits
        if fit.intercept_explained is not None
    ]
    if pairs:
        without, with_one = (sum(shares) / len(pairs) for shares in zip(*pairs, strict=True))
        progress.say(
            f"healing: maps without intercept give back {without:.1%} of the branches' outputs on "
            f"held-out tokens; with intercept it would be {with_one:.1%}"
        )


def tell_if_few(text: CalibrationText, loaded: LoadedModel, progress: Progress) -> None:
    """Warns where a linear map has nearly as many numbers to learn as there are tokens."""
    tokens, width = int(text.mask.sum()), loaded.model.config.get_text_config().hidden_size
    if tokens < _TOKENS_PER_INPUT * width:
        progress.say(
            f"healing: warning: {tokens} tokens are few for linear maps of {width} inputs; the "
            "ridge keeps them small, and more text would help"
        )


def _map(sums: Sums, ridge: float, rank: int | None) -> tuple[LinearMap, tuple[torch.Tensor, ...]]:
    """The map, and the matrices that it is kept as."""
    found = solve(sums, ridge)
    if rank is None:
        return found, (found.weight,)
    down, up = low_rank.factors(found, sums, ridge, rank)
    return low_rank.product(down, up, sums), (down, up)


def _groups(
    parts: Sequence[SublayerModules], loaded: LoadedModel, limit: int
) -> Iterator[Sequence[SublayerModules]]:
    """As many branches at once as the memory allows; at least one."""
    width = loaded.model.config.get_text_config().hidden_size
    size = max(1, limit // (2 * sums_bytes(width, width)))
    for start in range(0, len(parts), size):
        yield parts[start : start + size]


def _collected(
    loaded: LoadedModel,
    text: CalibrationText,
    later: HeldOut,
    parts: Sequence[SublayerModules],
    batch_size: int,
    progress: Progress,
) -> dict[SublayerRef, tuple[Sums, Sums]]:
    """One pass over the text: for each branch its sums over the first and the later tokens."""
    found: dict[SublayerRef, tuple[Sums, Sums]] = {}
    device = loaded.model.device
    with progress.task("collect activations", total=len(text.input_ids), unit="samples") as task:
        for batch in text.batches(batch_size):
            with observing(parts, batch.ids.shape, Adding(found, batch, later, device)):
                run_backbone(loaded.model, batch.inputs(device))
            task.advance(len(batch.ids))
    return found


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Which tokens belong to the second sums.

    Attributes:
        tokens: ``[samples, tokens]`` of the whole text.
        positions: Of an encoder-decoder, the same of what its encoder reads.
    """

    tokens: NDArray[np.bool_]
    positions: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, text: CalibrationText, share: float) -> HeldOut:
        """About a share of a text's tokens; see :func:`held_out_tokens`."""
        sources = text.sources
        positions = None if sources is None else held_out_tokens(sources.mask, share)
        return cls(held_out_tokens(text.mask, share), positions)


class Adding:
    """Adds what branches read and gave in one batch to their sums.

    Args:
        sums: Those so far, by branch; a branch met for the first time gets its own.
        batch: The samples.
        later: Which tokens of the whole text belong to the second sums.
        device: Of the model.
    """

    def __init__(
        self,
        sums: dict[SublayerRef, tuple[Sums, Sums]],
        batch: Batch,
        later: HeldOut | NDArray[np.bool_],
        device: torch.device,
    ) -> None:
        import torch

        self._sums, self._first_sample = sums, batch.first_sample
        rows = slice(batch.first_sample, batch.first_sample + len(batch.ids))
        held = later if isinstance(later, HeldOut) else HeldOut(later)
        self._target = batch.mask_on(device), torch.from_numpy(held.tokens[rows]).to(device)
        self._source = self._target
        if batch.sources is not None and held.positions is not None:
            mask = torch.from_numpy(batch.sources.mask).to(device)
            self._source = mask, torch.from_numpy(held.positions[rows]).to(device)

    def __call__(
        self,
        part: SublayerModules,
        x: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Takes one branch's activations, ``[batch, tokens, width]``.

        Args:
            part: The branch.
            x: What it reads.
            y: What it gives.
            weights: ``[batch, tokens]``, as how many each token counts; None: all as one.

        Raises:
            HealingError: When they are not finite.
        """
        mask, later = self._source if part.reads_sources else self._target
        check_finite(part, (x, y), mask, self._first_sample)
        name = part.ref
        if name not in self._sums:
            device = x.device if x.device.type in ("cpu", "cuda") else "cpu"
            shape = x.shape[-1], y.shape[-1]
            self._sums[name] = Sums(*shape, device), Sums(*shape, device)
        for sums, chosen in zip(self._sums[name], (mask & ~later, mask & later), strict=True):
            sums.add(x[chosen], y[chosen], None if weights is None else weights[chosen])
