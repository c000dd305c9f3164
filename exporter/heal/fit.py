"""What takes branches' places, fitted each on its own: of one kind, or the best in each place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifacts import HealKind, Training
from exporter.artifacts.loaded_plan import ChangedWeight
from exporter.artifacts.servers import places_of
from exporter.errors import HealingError
from exporter.heal.options import HealOptions
from exporter.heal.texts import HealingTexts
from exporter.models.ablation.branch_replacements import NOTHING, BranchReplacement, first_input
from exporter.models.ablation.meter import CutMeter, Within
from exporter.models.architectures import SublayerModules, every_sublayer, named_in
from exporter.models.loading.model_source import LoadedModel
from exporter.models.residual_stream import first_tensor, hooked, run_backbone
from exporter.models.tasks import meter_here
from exporter.models.texts.calibration import CalibrationText
from exporter.models.texts.samples import Batch
from exporter.progress import QUIET, Progress
from graph_passes.types import Replacement, SublayerRef

if TYPE_CHECKING:
    import torch


class Sums:
    """Sums over tokens of what a branch reads, x, and what it adds to the stream, y; in float64.

    x: `[inputs]`, sum of x.
    y: `[outputs]`, sum of y.
    xx: `[inputs, inputs]`, sum of x xᵀ.
    xy: `[inputs, outputs]`, sum of x yᵀ.
    yy: `[outputs]`, sum of the squares of y, column by column.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        import torch

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens: float = 0
        self.x, self.y, self.yy = zeros(inputs), zeros(outputs), zeros(outputs)
        self.xx, self.xy = zeros(inputs, inputs), zeros(inputs, outputs)

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Takes tokens in.

        x: `[tokens, inputs]`, of any floating dtype.
        y: `[tokens, outputs]`.
        weights: `[tokens]`, as how many each token counts; None: all as one.
        """
        x, y = x.to(self.xx), y.to(self.xx)
        weighed = x if weights is None else x * weights.to(self.xx)[:, None]
        counts = x.new_ones(len(x)) if weights is None else weights.to(self.xx)
        self.tokens += len(x) if weights is None else float(weights.sum())
        self.x += weighed.sum(0)
        self.y += counts @ y
        self.xx.addmm_(weighed.T, x)
        self.xy.addmm_(weighed.T, y)
        self.yy += counts @ (y * y)

    def through_origin(self) -> None:
        """Counts every token with its opposite beside it, so that a fit has no bias."""
        self.x, self.y = self.x.new_zeros(len(self.x)), self.y.new_zeros(len(self.y))

    def plus(self, other: Sums) -> Sums:
        """The sums over the tokens of both."""
        total = Sums(len(self.x), len(self.y), self.xx.device)
        total.tokens = self.tokens + other.tokens
        for name in ("x", "y", "yy", "xx", "xy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def y_squares(self) -> float:
        """Sum of the squared length of y."""
        return float(self.yy.sum())

    @property
    def x_mean(self) -> torch.Tensor:
        """``[inputs]``."""
        return self.x / self.tokens

    @property
    def y_mean(self) -> torch.Tensor:
        """``[outputs]``."""
        return self.y / self.tokens

    def about(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``xx`` and ``xy`` with x and y counted from other origins, such as the means.

        x: the origin of x, `[inputs]`.
        y: the origin of y, `[outputs]`.
        """
        xx = _about(self.xx, (self.x, self.x), (x, x), self.tokens)
        return xx, _about(self.xy, (self.x, self.y), (x, y), self.tokens)

    def y_squares_about(self, y: torch.Tensor) -> float:
        """Sum of the squared length of y, counted from another origin, ``[outputs]``."""
        return self.y_squares - 2 * float(self.y @ y) + self.tokens * float(y @ y)


Two = tuple["torch.Tensor", "torch.Tensor"]


def _about(products: torch.Tensor, sums: Two, origins: Two, tokens: float) -> torch.Tensor:
    """A sum of products, each factor counted from another origin; one matrix is made, no more."""
    result = products.addr(sums[0], origins[1], alpha=-1)
    result.addr_(origins[0], sums[1], alpha=-1)
    return result.addr_(origins[0], origins[1], alpha=tokens)


RIDGES: tuple[float, ...] = tuple(10 ** (step / 2) for step in range(-16, 7))
"""What is tried, relative to the mean eigenvalue: 1e-8 to 1e3."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y = weight x + bias``, in float64."""

    weight: torch.Tensor  # `[outputs, inputs]`
    bias: torch.Tensor  # `[outputs]`


@dataclass(frozen=True)
class RidgeChoice:
    """The ridge that does best on held-out tokens."""

    ridge: float
    # share of the held-out tokens' `sum |y|²` that the mean output of the other tokens takes away
    bias_explained: float
    linear_explained: float


def choose_ridge(fitted: Sums, held_out: Sums, ridges: Sequence[float] = RIDGES) -> RidgeChoice:
    """Tries ridges on tokens that the map is not fitted on; one eigendecomposition for all."""
    _check_tokens(fitted)
    _check_tokens(held_out)
    spectrum = _Spectrum(fitted)
    about_bias = held_out.y_squares_about(fitted.y_mean)
    losses = spectrum.held_out_losses(held_out, ridges)
    best = min(range(len(ridges)), key=losses.__getitem__)
    total = held_out.y_squares or 1.0
    return RidgeChoice(ridges[best], 1 - about_bias / total, 1 - losses[best] / total)


def solve(sums: Sums, ridge: float) -> LinearMap:
    """The ridge least-squares map; a ridge is above 0."""
    import torch

    xx, xy = sums.about(sums.x_mean, sums.y_mean)
    xx.diagonal().add_(ridge * _scale(xx))
    weight = torch.cholesky_solve(xy, torch.linalg.cholesky(xx)).T
    return LinearMap(weight, sums.y_mean - weight @ sums.x_mean)


class _Spectrum:
    """The eigenvectors of ``Sxx``, in which a ridge is a division."""

    def __init__(self, sums: Sums) -> None:
        import torch

        self._x_mean, self._y_mean = sums.x_mean, sums.y_mean
        xx, xy = sums.about(self._x_mean, self._y_mean)
        self._scale = _scale(xx)
        values, self._vectors = torch.linalg.eigh(xx)
        self._values = values.clamp(min=0.0)
        self._xy = self._vectors.T @ xy

    def held_out_losses(self, held_out: Sums, ridges: Sequence[float]) -> list[float]:
        """``sum |y - W x - b|²`` over held-out tokens, for each ridge.

        With ``d = 1 / (eigenvalue + λ)`` the loss is a quadratic form in d, so that trying a ridge
        costs no product of matrices.
        """
        import torch

        xx, xy = held_out.about(self._x_mean, self._y_mean)
        linear = torch.linalg.vecdot(self._xy, self._vectors.T @ xy)
        half = self._vectors.T @ xx
        del xx, xy
        square = half @ self._vectors
        del half
        square *= self._xy @ self._xy.T
        constant = held_out.y_squares_about(self._y_mean)
        losses = []
        for ridge in ridges:
            d = 1 / (self._values + ridge * self._scale)
            losses.append(constant - 2 * float(linear @ d) + float(d @ square @ d))
        return losses


def _scale(xx: torch.Tensor) -> float:
    """The mean eigenvalue; 1 where x never changes, so that a ridge still makes W = 0."""
    return float(xx.trace()) / len(xx) or 1.0


def _check_tokens(sums: Sums) -> None:
    if not sums.tokens:
        raise HealingError(
            "There are no tokens to fit a replacement on, or none to judge it on.",
            "Give more to calibrate on (--samples).",
            code="too-few-tokens",
        )


Choices = Mapping[Replacement, tuple[float, BranchReplacement]]
"""What may take a branch's place, with the share of its output that it gives back."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What may take one branch's place."""

    bias: BranchReplacement
    linear: BranchReplacement
    ridge: float
    bias_explained: float
    linear_explained: float

    @property
    def choices(self) -> Choices:
        """What may stand in the place, the simplest first."""
        return {
            "none": (0.0, NOTHING),
            "bias": (self.bias_explained, self.bias),
            "linear": (self.linear_explained, self.linear),
        }


Branch = Callable[[SublayerModules, "torch.Tensor", "torch.Tensor"], None]
"""Takes a branch, what it read and what it added, both ``[batch, tokens, width]``."""

_FEWEST_SAMPLES, _HELD_OUT = 5, 0.2


def observing(
    parts: Sequence[SublayerModules], shape: tuple[int, ...], listener: Branch
) -> contextlib.AbstractContextManager[None]:
    """Tells of each named branch in each forward pass inside the block; no hook is left behind."""
    return hooked(handle for part in parts for handle in _hooks(part, shape, listener))


def _hooks(part: SublayerModules, shape: tuple[int, ...], listener: Branch) -> Iterator[Any]:
    read: list[torch.Tensor] = []

    def remember(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy: some layers go on adding to this very tensor.
        read[:] = [first_input(args, kwargs).clone()]

    def tell(_module: Any, _inputs: Any, output: Any) -> None:
        x, y = (
            item if part.reads_sources else item.reshape(*shape, -1)
            for item in (read.pop(), first_tensor(output))
        )
        listener(part, x, y * part.multiplier)

    yield part.reads.register_forward_pre_hook(remember, with_kwargs=True)
    yield part.contribution.register_forward_hook(tell)


def check_finite(
    part: SublayerModules, what: Sequence[torch.Tensor], mask: torch.Tensor, first_sample: int
) -> None:
    """Refuses activations that are NaN or infinite where a token is.

    what: activations `[batch, tokens, width]`.
    mask: `[batch, tokens]`, boolean; False marks padding.
    """
    for tensor in what:
        bad = (~tensor.isfinite().all(-1) & mask).any(-1)
        if bool(bad.any()):
            sample = first_sample + int(bad.int().argmax())
            raise HealingError(
                f"The activations of the {part.kind} of layer {part.layer} are not finite in "
                f"sample {sample}.",
                "Load the model in float32, or check its weights.",
                code="not-finite",
            )


def held_out_tokens(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which tokens a ridge is judged on: whole samples, spread evenly over the text.

    A text of fewer than five samples holds out the end of each one.

    ``[samples, tokens]``; True where a token is held out.

    mask: `[samples, tokens]`; False marks padding.
    """
    numbers = np.arange(1, len(mask) + 1)
    chosen = np.floor(numbers * _HELD_OUT) > np.floor((numbers - 1) * _HELD_OUT)
    if len(mask) >= _FEWEST_SAMPLES and 0 < chosen.sum() < len(mask):
        array: NDArray[np.bool_] = mask & chosen[:, None]
    else:
        order, lengths = mask.cumsum(1), mask.sum(1, keepdims=True)
        array = mask & (order > np.ceil(lengths * (1 - _HELD_OUT)))
    if not array.any() or not (mask & ~array).any():
        raise HealingError(
            f"{int(mask.sum())} tokens are too few to fit a replacement and to judge it on others.",
            "Give more to calibrate on (--samples).",
            code="too-few-tokens",
        )
    return array


MEMORY_LIMIT_BYTES = 4 << 30
_TOKENS_PER_INPUT = 4


def fit_branches(
    loaded: LoadedModel,
    text: CalibrationText,
    names: Iterable[SublayerRef] | None = None,  # the branches, by layer and kind; None: all
    *,
    ridge: float | None = None,  # None: chosen for each branch on held-out tokens
    intercept: bool = True,
    batch_size: int = 4,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    uses_maps: bool = True,
    progress: Progress = QUIET,
) -> dict[SublayerRef, Fit]:
    """Fits a bias and a linear map for branches of the unchanged model."""
    parts = {part.ref: part for part in every_sublayer(loaded.model)}
    wanted = [parts[name] for name in named_in(loaded.model, parts if names is None else names)]
    later, fits = HeldOut.of(text), {}
    width = loaded.model.config.get_text_config().hidden_size
    bytes_each = 2 * 8 * width * 2 * width  # two sets of sums in float64
    size = max(1, memory_limit_bytes // bytes_each)
    for start in range(0, len(wanted), size):
        sums = _collected(loaded, text, later, wanted[start : start + size], batch_size, progress)
        for name in sorted(sums):
            fits[name] = _fitted(*sums.pop(name), ridge, intercept=intercept)
    if uses_maps:
        tell_if_few(text, loaded, progress)
    return dict(sorted(fits.items()))


def _fitted(first: Sums, later: Sums, ridge: float | None, *, intercept: bool) -> Fit:
    """The fit from a branch's sums."""
    if not intercept:
        first.through_origin()
        later.through_origin()
    choice = choose_ridge(first, later, RIDGES if ridge is None else [ridge])
    total = first.plus(later)
    linear = solve(total, choice.ridge)
    return Fit(
        bias=BranchReplacement(total.y_mean.float().cpu()),
        linear=BranchReplacement(linear.bias.float().cpu(), linear.weight.float().cpu()),
        ridge=choice.ridge,
        bias_explained=choice.bias_explained,
        linear_explained=choice.linear_explained,
    )


def tell_if_few(text: CalibrationText, loaded: LoadedModel, progress: Progress) -> None:
    """Warns where a linear map has nearly as many numbers to learn as there are tokens."""
    tokens, width = int(text.mask.sum()), loaded.model.config.get_text_config().hidden_size
    if tokens < _TOKENS_PER_INPUT * width:
        progress.say(
            f"healing: warning: {tokens} tokens are few for linear maps of {width} inputs; the "
            "ridge keeps them small, and more text would help"
        )


def _collected(
    loaded: LoadedModel,
    text: CalibrationText,
    later: HeldOut,
    parts: Sequence[SublayerModules],
    batch_size: int,
    progress: Progress,
) -> dict[SublayerRef, tuple[Sums, Sums]]:
    """One pass over the text: for each branch its sums over the first and the later tokens."""
    results: dict[SublayerRef, tuple[Sums, Sums]] = {}
    device = loaded.model.device
    with progress.task("collect activations", total=len(text.input_ids), unit="samples") as task:
        for batch in text.batches(batch_size):
            with observing(parts, batch.ids.shape, Adding(results, batch, later, device)):
                run_backbone(loaded.model, batch.inputs(device))
            task.advance(len(batch.ids))
    return results


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Which tokens belong to the second sums."""

    tokens: NDArray[np.bool_]  # `[samples, tokens]` of the whole text
    positions: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, text: CalibrationText) -> HeldOut:
        """About a fifth of a text's tokens; see :func:`held_out_tokens`."""
        sources = text.sources
        positions = None if sources is None else held_out_tokens(sources.mask)
        return cls(held_out_tokens(text.mask), positions)


class Adding:
    """Adds what branches read and gave in one batch to their sums."""

    def __init__(
        self,
        sums: dict[SublayerRef, tuple[Sums, Sums]],
        batch: Batch,
        later: HeldOut,
        device: torch.device,
    ) -> None:
        import torch

        self._sums, self._first_sample = sums, batch.first_sample
        rows = slice(batch.first_sample, batch.first_sample + len(batch.ids))
        self._target = batch.mask_on(device), torch.from_numpy(later.tokens[rows]).to(device)
        self._source = self._target
        if batch.sources is not None and later.positions is not None:
            mask = torch.from_numpy(batch.sources.mask).to(device)
            self._source = mask, torch.from_numpy(later.positions[rows]).to(device)

    def __call__(
        self,
        part: SublayerModules,
        x: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor | None = None,  # `[batch, tokens]`, as how many each token counts
    ) -> None:
        """Takes one branch's activations, ``[batch, tokens, width]``."""
        mask, later = self._source if part.reads_sources else self._target
        check_finite(part, (x, y), mask, self._first_sample)
        name = part.ref
        if name not in self._sums:
            device = x.device if x.device.type in ("cpu", "cuda") else "cpu"
            shape = x.shape[-1], y.shape[-1]
            self._sums[name] = Sums(*shape, device), Sums(*shape, device)
        for sums, chosen in zip(self._sums[name], (mask & ~later, mask & later), strict=True):
            sums.add(x[chosen], y[chosen], None if weights is None else weights[chosen])


@dataclass(frozen=True)
class Made:
    """What makes up for the dropped branches, not yet written."""

    held_out: CalibrationText
    branch_replacements: dict[SublayerRef, BranchReplacement]
    fits: Mapping[SublayerRef, Fit] = field(default_factory=dict)
    weights: Mapping[str, ChangedWeight] = field(default_factory=dict)
    deciding: CalibrationText | None = None  # None where nothing was decided
    training: Training | None = None  # how they came about; None where nothing was trained
    within: Within | None = None  # None where it keeps its own


@dataclass(frozen=True)
class Fitting:
    """What is fitted, on which texts, and how."""

    loaded: LoadedModel
    texts: HealingTexts
    names: list[SublayerRef]
    options: HealOptions
    work: Path | None  # keeps the state of a training; None keeps nothing
    progress: Progress

    def best(
        self, chooser: CalibrationText
    ) -> tuple[dict[SublayerRef, BranchReplacement], dict[SublayerRef, Fit]]:
        """The kind that does best in each place, as a text tells that nothing was fitted on."""
        fits, size = self._alone(), self.options.batch_size
        meter: CutMeter[Any] = meter_here(self.loaded, chooser, size, positions=1)
        return _by_damage(meter, fits, self._choices(fits), self.progress), fits

    def alike(
        self, kind: HealKind
    ) -> tuple[dict[SublayerRef, BranchReplacement], dict[SublayerRef, Fit]]:
        """The same kind everywhere."""
        held = [name for name in self.names if kind in places_of(self.options.server, name)]
        fits = self._alone(held, uses_maps=kind != "bias")
        bias = {name: fit.bias if kind == "bias" else fit.linear for name, fit in fits.items()}
        return {name: bias.get(name, NOTHING) for name in self.names}, fits

    def _choices(self, fits: Mapping[SublayerRef, Fit]) -> dict[SublayerRef, Choices]:
        """What the server holds in each place, the simplest first."""
        return {
            name: {
                kind: what
                for kind, what in fit.choices.items()
                if kind in places_of(self.options.server, name)
            }
            for name, fit in fits.items()
        }

    def _alone(
        self, names: list[SublayerRef] | None = None, *, uses_maps: bool = True
    ) -> dict[SublayerRef, Fit]:
        """Each fitted on the whole model."""
        return fit_branches(
            self.loaded,
            self.texts.fitting,
            self.names if names is None else names,
            intercept=self.options.intercept,
            batch_size=self.options.batch_size,
            uses_maps=uses_maps,
            progress=self.progress,
        )


def _by_damage(
    meter: CutMeter[Any],
    fits: Mapping[SublayerRef, Fit],
    choices: Mapping[SublayerRef, Choices],
    progress: Progress = QUIET,
) -> dict[SublayerRef, BranchReplacement]:
    """What leaves the answers nearest, branch after branch, the others as they stand.

    Begins with what explains most of each output, and goes through the branches once, from the
    last layer down, so that each run begins as high as it can.
    """
    current = {
        name: max(own.values(), key=lambda choice: choice[0])[1] for name, own in choices.items()
    }
    with progress.task("choose replacements", total=len(fits), unit="sublayers") as task:
        for name in sorted(fits, reverse=True):
            taken = current[name]
            options = [what for _, what in choices[name].values()]
            others = [one for one in options if one is not taken]
            cuts = [{**current, name: one} for one in others]
            damages = meter.measure_many(current, cuts)
            pairs = zip([taken, *others], damages, strict=True)
            # Of two that are equal the simpler one.
            best = min(pairs, key=lambda pair: (pair[1].distance, options.index(pair[0])))
            current[name] = best[0]
            task.advance()
    return current
