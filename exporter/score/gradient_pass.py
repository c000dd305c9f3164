"""Gradients of the loss at each sublayer's output, a sample at a time.

A sample at a time, since a pass backwards keeps the activations of every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifacts import Score
from exporter.errors import ScoringError
from exporter.models.ablation.branch_replacements import first_input
from exporter.models.ablation.ratios import Floats, RatioSums
from exporter.models.anatomy.architectures import sublayers
from exporter.models.anatomy.residual_stream import LayerModules, first_tensor, hooked
from exporter.models.texts.calibration import CalibrationText
from exporter.score.metric import UNITS, GradientMetric
from exporter.score.scored_model import ScoredModel
from exporter.score.stream_pass import NOT_FINITE_HINT, scores_of

if TYPE_CHECKING:
    import torch

_NO_GRADIENTS_HINT = "Score the model from before its quantisation, or take another metric."


def refuse_without_gradients(model: Any, name: str) -> None:
    """Refuses models whose weights give no gradients, such as quantised ones.

    Raises:
        ScoringError: With the first weight that is no floating-point number.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ScoringError(
            f"{name} needs gradients, and this {type(model).__name__} is quantised.",
            _NO_GRADIENTS_HINT,
            code="not-differentiable",
        )
    for weight, tensor in model.named_parameters():
        if not tensor.is_floating_point():
            what = str(tensor.dtype).removeprefix("torch.")
            raise ScoringError(
                f"{name} needs gradients, and {weight} holds {what}.",
                _NO_GRADIENTS_HINT,
                code="not-differentiable",
            )
    for place, module in model.named_modules():
        if "quantized" in type(module).__module__.split("."):
            raise ScoringError(
                f"{name} needs gradients, and {place} is a {type(module).__name__}.",
                _NO_GRADIENTS_HINT,
                code="not-differentiable",
            )


def gradient_scores(
    scored: ScoredModel, metrics: Sequence[GradientMetric]
) -> dict[str, list[Score]]:
    """The scores by each metric's name, from one pass forward and one back.

    Raises:
        ScoringError: The loss or a gradient is NaN or infinite, none reaches some sublayer, or no
            token has a next one to predict.
    """
    refuse_without_targets(scored.text)
    samples = range(len(scored.text.input_ids))

    def followed() -> Generator[Floats]:
        with scored.progress.task("follow gradients", total=len(samples), unit="samples") as task:
            for sample in samples:
                yield gradient_sums(scored, metrics, sample)
                task.advance()

    with contextlib.closing(followed()) as found:  # else its task outlives an interruption
        return scores_of_gradients(scored.text, len(scored.layers), metrics, found)


def refuse_without_targets(text: CalibrationText) -> None:
    """Refuses a text in which no token has a next one to predict.

    Raises:
        ScoringError: It is such a text.
    """
    mask = text.mask
    if not (mask[:, 1:] & mask[:, :-1]).any():
        raise ScoringError(
            "There is no token with a next one to predict.",
            "Give longer samples.",
            code="no-tokens",
        )


def scores_of_gradients(
    text: CalibrationText,
    num_layers: int,
    metrics: Sequence[GradientMetric],
    found: Iterable[Floats],
) -> dict[str, list[Score]]:
    """The scores by each metric's name.

    Args:
        text: The samples.
        num_layers: How many layers the model has.
        metrics: What was collected.
        found: Of each sample in the order of the text, ``[metrics, layers, units]``.
    """
    sums = [RatioSums((num_layers, len(UNITS))) for _ in metrics]
    for mask, sample in zip(text.mask, found, strict=True):
        weights = np.array([float(mask.sum())])
        for running, values in zip(sums, sample, strict=True):
            running.add(values[..., None], weights)
    return {metric.name: scores_of(running) for metric, running in zip(metrics, sums, strict=True)}


def gradient_sums(scored: ScoredModel, metrics: Sequence[GradientMetric], sample: int) -> Floats:
    """One sample's sums, ``[metrics, layers, units]``.

    Raises:
        ScoringError: The loss or a gradient is NaN or infinite, or none reaches some sublayer.
    """
    import torch

    model, device = scored.model, scored.model.device
    ids = torch.from_numpy(scored.text.input_ids[sample : sample + 1]).to(device)
    mask = torch.from_numpy(scored.text.mask[sample : sample + 1]).to(device)
    taps = _Taps(scored.layers, metrics, mask)
    with hooked(taps.hooks(model)), torch.enable_grad():
        loss = _loss(model, ids, mask)
        _check_loss(loss, sample)
        # Not backward(), which would leave gradients in weights that want some.
        torch.autograd.grad(loss, taps.entering, allow_unused=True)
    return taps.found(sample)


def _loss(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The summed negative log-likelihood of all real tokens that follow a real one."""
    import torch

    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    follows = mask[:, :-1] & mask[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][follows].float(), ids[:, 1:][follows], reduction="sum"
    )


def _check_loss(loss: torch.Tensor, sample: int) -> None:
    if not bool(loss.isfinite()):
        raise ScoringError(
            f"The loss is not finite in sample {sample}.", NOT_FINITE_HINT, code="not-finite"
        )
    if not loss.requires_grad:
        raise ScoringError("No gradient reaches the model's layers.", _NO_GRADIENTS_HINT)


class _Taps:
    """Hooks on one sample's passes; what comes back along them is summed at once.

    Attributes:
        entering: The stream that enters the layers, once there; the leaf to follow gradients to.
    """

    def __init__(
        self, layers: Sequence[LayerModules], metrics: Sequence[GradientMetric], mask: torch.Tensor
    ) -> None:
        self._layers, self._metrics, self._mask = layers, metrics, mask
        self._values = np.full((len(metrics), len(layers), len(UNITS)), np.nan)
        self._reached = np.zeros((len(layers), len(UNITS)), dtype=np.bool_)
        self.entering: list[torch.Tensor] = []

    def hooks(self, model: Any) -> Iterator[Any]:
        """Registers what listens."""
        first = self._layers[0].layer
        yield first.register_forward_pre_hook(self._with_gradient, with_kwargs=True)
        for part in sublayers(model):
            hook = self._branch(part.layer, UNITS.index(part.kind))
            yield part.contribution.register_forward_hook(hook)
        for modules in self._layers:
            yield from self._block(modules)

    def found(self, sample: int) -> Floats:
        """The sample's sums, ``[metrics, layers, units]``.

        Raises:
            ScoringError: Something is not finite, or no gradient came to some place.
        """
        for layer, unit in np.argwhere(~self._reached):
            raise ScoringError(
                f"No gradient reaches the {UNITS[unit]} of layer {layer}.",
                _NO_GRADIENTS_HINT,
                code="no-gradient",
            )
        for _, layer, unit in np.argwhere(~np.isfinite(self._values)):
            raise ScoringError(
                f"The gradients at the {UNITS[unit]} of layer {layer} are not finite in sample "
                f"{sample}.",
                NOT_FINITE_HINT,
            )
        return self._values

    def _branch(self, layer: int, unit: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            # A copy: some layers go on adding to this very tensor.
            self._listen(tensor, tensor.detach().clone(), layer, unit)

        return hook

    def _block(self, modules: LayerModules) -> Iterator[Any]:
        entered: list[torch.Tensor] = []

        def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[:] = [first_input(args, kwargs).detach().clone()]

        def leave(_module: Any, _inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            added = tensor.detach() - entered.pop()
            self._listen(tensor, added, modules.number, UNITS.index("block"))

        yield modules.layer.register_forward_pre_hook(enter, with_kwargs=True)
        yield modules.layer.register_forward_hook(leave)

    def _listen(self, tensor: torch.Tensor, value: torch.Tensor, layer: int, unit: int) -> None:
        if not tensor.requires_grad:
            return

        def back(gradient: torch.Tensor) -> None:
            import torch

            self._reached[layer, unit] = True
            for number, metric in enumerate(self._metrics):
                # OPT flattens batch and tokens on the way.
                at_tokens = metric.of(value, gradient).reshape(self._mask.shape)
                kept = torch.where(self._mask, at_tokens, 0.0)
                self._values[number, layer, unit] = float(kept.sum())

        tensor.register_hook(back)  # type: ignore[no-untyped-call]

    def _with_gradient(
        self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Lets the layers' stream want gradients, whether or not the weights do."""
        if args:
            return (self._wanting(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._wanting(kwargs["hidden_states"])}

    def _wanting(self, stream: torch.Tensor) -> torch.Tensor:
        self.entering = [stream.detach().requires_grad_()]
        # A copy that is no leaf, so that layers may add to it in place.
        return self.entering[0].clone()
