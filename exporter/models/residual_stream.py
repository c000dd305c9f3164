"""Listens to the residual stream of a running model, and checks that a layout describes it."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from exporter.models.model_folder import image_shape

if TYPE_CHECKING:
    import torch

ResidualForm = Literal["sequential", "parallel", "post_norm"]
ProbeVerdict = Literal["adds_up", "silent", "differs", "not_finite"]

_T = TypeVar("_T")
_PROBE_TOKENS = 8
_FEATURES = ("input_features", "pixel_values")
# Rounding of a sum in the stream's own dtype, relative to the largest activation.
_PROBE_TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-9}


@dataclass(frozen=True)
class LayerModules:
    """The modules of one layer that touch the residual stream."""

    number: int  # the layer's number from 0
    layer: torch.nn.Module
    attention: torch.nn.Module
    mlp: torch.nn.Module
    form: ResidualForm
    multiplier: float = 1.0
    attention_norm: torch.nn.Module | None = None
    mlp_norm: torch.nn.Module | None = None
    attention_reads: torch.nn.Module | None = None  # None: `attention`
    mlp_reads: torch.nn.Module | None = None
    # the same as `attention`, between it and the MLP: in the decoder of an encoder-decoder
    cross_attention: torch.nn.Module | None = None
    cross_attention_norm: torch.nn.Module | None = None


@dataclass(frozen=True, eq=False)
class LayerStates:
    """The residual stream around one layer's sublayers, for one forward pass.

    All are ``[batch, tokens, hidden]``, in float32 or wider. States that are the same are the
    same object: ``attended is mlp_in`` in a sequential layer.
    """

    number: int
    entering: torch.Tensor
    attended: torch.Tensor
    mlp_in: torch.Tensor
    mlp_out: torch.Tensor
    leaving: torch.Tensor
    output: torch.Tensor
    crossing: torch.Tensor | None = None  # x of the cross-attention; None in a layer without one
    crossed: torch.Tensor | None = None


Listener = Callable[[LayerStates], None]


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Keeps hooks while the block runs, and leaves none behind, whatever the block raises."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def tapped(
    layers: Sequence[LayerModules], listener: Listener
) -> contextlib.AbstractContextManager[None]:
    """Calls ``listener`` after each layer of each forward pass inside the block."""
    return hooked(handle for modules in layers for handle in _LayerTap(modules, listener).hooks())


def first_tensor(output: Any) -> torch.Tensor:
    """What a module computes, when attention weights or router logits come along in a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def silenced(modules: Sequence[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Makes modules return zeros inside the block."""
    return hooked(module.register_forward_hook(_zeroed) for module in modules)


def run_backbone(model: Any, inputs: dict[str, Any]) -> Any:
    """Runs a model up to its last layer, without head and cache; what its backbone returns."""
    import torch

    backbone = model.base_model
    if "use_cache" in inspect.signature(backbone.forward).parameters:
        inputs = {**inputs, "use_cache": False}
    with torch.inference_mode():
        return backbone(**in_own_dtype(model, inputs))


def in_own_dtype(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with sounds and images in the model's dtype; tokens stay as they are."""
    own = {name: inputs[name].to(model.dtype) for name in _FEATURES if name in inputs}
    return {**inputs, **own}


def probe(model: Any, layers: Sequence[LayerModules]) -> ProbeVerdict:
    """Runs a few tokens and compares the layers' outputs with the sums of their branches.

    Also tells sequential from parallel layers: only in the former does the MLP of the first
    layer change when its attention is silenced.
    """
    findings = ProbeFindings(layers)
    findings.look(layers, partial(run_backbone, model, probe_inputs(model)))
    return findings.verdict


class ProbeFindings:
    """What a few tokens show of a layout, all layers at once or one after the other."""

    def __init__(self, layers: Sequence[LayerModules]) -> None:
        self._layers = layers
        self._left = len(layers)
        self._finite, self._sums_hold, self._silent = True, True, False
        # Whether the first MLP's output changes when its attention is silenced.
        self._reads_attention: bool | None = None

    def look(self, layers: Sequence[LayerModules], run: Callable[[], _T]) -> _T:
        """Judges the layers that a run goes through; the first of the model runs twice."""
        first, states = layers[0], list[LayerStates]()
        with tapped(layers, states.append), output_of(first.mlp) as live:
            result = run()
        for state in states:
            self._take(state)
        if not first.number:
            with silenced([first.attention]), output_of(first.mlp) as deaf:
                run()
            self._reads_attention = not live[0].equal(deaf[0])
        return result

    def _take(self, states: LayerStates) -> None:
        """Judges one layer; it must still be there, since its norms may run again."""
        import torch

        self._left -= 1
        self._finite &= bool(states.output.isfinite().all())
        if self._finite:
            with torch.inference_mode():
                self._sums_hold &= _sums_hold(self._layers[states.number], states)
        self._silent |= _is_silent(states)

    @property
    def verdict(self) -> ProbeVerdict:
        """What :func:`probe` returns."""
        return "differs" if self._left and self._finite else self.so_far

    @property
    def so_far(self) -> ProbeVerdict:
        """The same, were there no more layers than those that were judged."""
        if not self._finite:
            return "not_finite"
        if not self._sums_hold:
            return "differs"
        if self._silent:
            return "silent"
        reads_attention = self._layers[0].form != "parallel"
        return "adds_up" if self._reads_attention == reads_attention else "differs"


class _LayerTap:
    """Collects one layer's states while it runs."""

    def __init__(self, modules: LayerModules, listener: Listener) -> None:
        self._modules = modules
        self._listener = listener
        self._states: dict[str, torch.Tensor] = {}

    def hooks(self) -> Iterator[Any]:
        modules = self._modules
        yield modules.layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        yield modules.attention.register_forward_hook(self._attention)
        yield modules.mlp.register_forward_hook(self._mlp)
        cross = modules.cross_attention
        behind = "mlp_in" if cross is None else "crossing"
        if modules.attention_norm is not None:
            hook = partial(self._between, behind)
            yield modules.attention_norm.register_forward_hook(hook)
        if cross is not None:
            yield cross.register_forward_hook(self._cross)
        if modules.cross_attention_norm is not None:
            hook = partial(self._between, "mlp_in")
            yield modules.cross_attention_norm.register_forward_hook(hook)
        yield modules.layer.register_forward_hook(self._leave)

    def _enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        self._states = {"entering": _wide(stream)}

    def _attention(self, _module: Any, _inputs: Any, output: Any) -> None:
        attended = self._sum(self._states["entering"], output)
        self._states["attended"] = attended
        if self._modules.form == "sequential":
            crosses = self._modules.cross_attention is not None
            self._states["crossing" if crosses else "mlp_in"] = attended
        elif self._modules.form == "parallel":
            self._states["mlp_in"] = self._states["entering"]

    def _between(self, name: str, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self._states[name] = _wide(output).view_as(self._states["entering"])

    def _cross(self, _module: Any, _inputs: Any, output: Any) -> None:
        crossed = self._sum(self._states["crossing"], output)
        self._states["crossed"] = crossed
        if self._modules.form == "sequential":
            self._states["mlp_in"] = crossed

    def _mlp(self, _module: Any, _inputs: Any, output: Any) -> None:
        # At once: some layers go on adding to this very tensor.
        self._states["mlp_out"] = self._sum(self._states["mlp_in"], output)
        if self._modules.form == "parallel":
            self._states["leaving"] = self._sum(self._states["attended"], output)

    def _leave(self, _module: Any, _inputs: Any, output: Any) -> None:
        out = first_tensor(output)
        states, self._states = self._states, {}
        if self._modules.form == "post_norm":
            states["leaving"] = _wide(out)
        else:
            states.setdefault("leaving", states["mlp_out"])
        self._listener(LayerStates(number=self._modules.number, output=out, **states))

    def _sum(self, stream: torch.Tensor, output: Any) -> torch.Tensor:
        import torch

        # OPT flattens batch and tokens on the way.
        branch = first_tensor(output).reshape(stream.shape)
        return torch.add(stream, branch, alpha=self._modules.multiplier)


def _wide(stream: torch.Tensor) -> torch.Tensor:
    import torch

    return stream if stream.dtype == torch.float64 else stream.float()


def _zeroed(_module: Any, _inputs: Any, output: Any) -> Any:
    # Zeros, not a product: a branch that overflows would give NaN.
    if isinstance(output, tuple):
        return (output[0].new_zeros(output[0].shape), *output[1:])
    return output.new_zeros(output.shape)


@contextlib.contextmanager
def output_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects copies of what a module gives in the block."""
    outputs: list[torch.Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(first_tensor(output).clone())
    )
    with hooked([handle]):
        yield outputs


def probe_inputs(model: Any) -> dict[str, torch.Tensor]:
    """A few tokens, or a picture, that any model of the kind takes."""
    import torch

    config, device = model.config, model.device
    if config.is_encoder_decoder:
        tokens = (torch.arange(_PROBE_TOKENS, device=device)[None] * 7 + 5) % config.vocab_size
        return {**encoder_inputs(model, tokens), "decoder_input_ids": tokens}
    if model.main_input_name == "pixel_values":
        shape = (1, *image_shape(config.to_dict()))
        grid = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
        return {"pixel_values": (grid * 0.7).sin().reshape(shape).to(model.dtype)}
    vocabulary = config.get_text_config().vocab_size
    return {"input_ids": (torch.arange(_PROBE_TOKENS, device=device)[None] * 7 + 5) % vocabulary}


def encoder_inputs(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an encoder may read, ``[batch, ...]``: tokens, or the features of a sound.

    tokens: `[batch, tokens]`, for encoders of text.
    """
    import torch

    if model.main_input_name != "input_features":
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    config = model.config
    shape = (len(tokens), config.num_mel_bins, 2 * config.max_source_positions)
    grid = torch.arange(torch.Size(shape).numel(), device=tokens.device, dtype=torch.float32)
    return {"input_features": (grid * 0.7).sin().reshape(shape).to(model.dtype)}


def _sums_hold(modules: LayerModules, states: LayerStates) -> bool:
    pairs = [(states.leaving, states.output)]
    if modules.attention_norm is not None and modules.mlp_norm is not None:
        norms = [modules.attention_norm, modules.cross_attention_norm, modules.mlp_norm]
        sums = [states.attended, states.crossed, states.mlp_out]
        behind = [states.crossing, states.mlp_in, states.output]
        if modules.cross_attention_norm is None:
            norms[1:2], sums[1:2], behind[:1] = [], [], []
        pairs = [
            (norm(added.to(states.output.dtype)), out)
            for norm, added, out in zip(norms, sums, behind, strict=True)
            if norm is not None and added is not None and out is not None
        ]
    tolerance = _PROBE_TOLERANCE[str(states.output.dtype).removeprefix("torch.")]
    limit = tolerance * max(1e-30, float(states.output.abs().max()))
    return all(float((a - b).abs().max()) <= limit for a, b in pairs)


def _is_silent(states: LayerStates) -> bool:
    crosses = states.crossing is not None and states.crossed is not None
    silent = crosses and states.crossed.equal(states.crossing)  # type: ignore[union-attr,arg-type]
    return silent or states.attended.equal(states.entering) or states.mlp_out.equal(states.mlp_in)


REGRESSION = "regression"


def classifies_texts(model: Any) -> bool:
    """Whether a model gives each text a class or a score, not each token."""
    return type(model).__name__.endswith("ForSequenceClassification")


def scores_pairs(model: Any) -> bool:
    """Whether a model is a reranker: its single logit scores a query with its passage.

    A ``problem_type`` of regression is what transformers' trainer writes for scores of any texts.
    """
    config = model.config
    classes = config.num_labels if classifies_texts(model) else None
    return ranks_pairs(classes, getattr(config, "problem_type", None))


def classes_of_texts(logits: Sequence[int | str | None] | None) -> int | str | None:
    """How many classes a graph gives each text, by its logits' shape; None where none, or tokens.

    logits: as the graph tells it, `[texts, classes]` or `[texts, tokens, classes]`.
    """
    return logits[-1] if logits is not None and len(logits) == len(("texts", "classes")) else None


def ranks_pairs(classes: int | str | None, problem_type: str | None) -> bool:
    """:func:`scores_pairs` by the classes of a text and the ``problem_type`` of ``config.json``."""
    return classes == 1 and problem_type != REGRESSION


def together_in(model: Any) -> int:
    """How many texts give one answer: two, where a single logit orders them."""
    return 2 if classifies_texts(model) and model.config.num_labels == 1 else 1


def class_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Runs a classifier on texts that are padded at the end; each gets the logits it has alone.

    Transformers' decoders find a text's last token by ``config.pad_token_id``. So padding gets that
    id here; a config without one gets an id that no text ends with while the model runs.

    Logits, ``[batch, classes]`` or ``[batch, tokens, classes]``.
    """
    if "input_ids" not in inputs:
        logits: torch.Tensor = model(**in_own_dtype(model, inputs)).logits
        return logits
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    config = model.config.get_text_config()
    with _padding_known(config, ids, mask) as padding:
        given = {**inputs, "input_ids": ids.masked_fill(mask == 0, padding)}
        tensor: torch.Tensor = model(**given).logits
    return tensor


@contextlib.contextmanager
def _padding_known(config: Any, ids: torch.Tensor, mask: torch.Tensor) -> Iterator[int]:
    """The id of padding; the config has it while the block runs."""
    own = config.pad_token_id
    if own is not None and 0 <= own < config.vocab_size:
        yield own
        return
    lengths = mask.long().sum(-1, keepdim=True)
    last = set(ids.gather(1, lengths - 1).flatten().tolist())
    config.pad_token_id = next(number for number in itertools.count() if number not in last)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = own
