"""Runs a model once, and then only from the layer on in which a cut differs from the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from exporter.models.ablation.branch_replacements import (
    BranchReplacement,
    BranchReplacements,
    first_input,
    replacing_hooks,
)
from exporter.models.architectures import layer_modules, sublayers_of
from exporter.models.residual_stream import (
    LayerModules,
    class_logits,
    first_tensor,
    hooked,
    in_own_dtype,
    probe_inputs,
    run_backbone,
)
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch

Runs = Literal["language", "all", "states"]
"""The model with its language head at some places, all of it, or without any head."""

Places = Callable[["torch.Tensor"], "torch.Tensor"]
"""From the last hidden states ``[batch, tokens, hidden]`` to those that the head is run on, or to
what is asked of a model without its head."""


@dataclass(frozen=True, eq=False)
class Streams:
    """What one run of some samples left behind, for runs that begin higher up."""

    inputs: dict[str, torch.Tensor]
    cut: BranchReplacements
    outputs: list[Any]
    # of each sequential layer, the stream between attention and MLP, `[batch, tokens, hidden]`
    attended: dict[int, torch.Tensor]


class StreamRunner:
    """A model that runs whole or from some layer on, with branches cut."""

    def __init__(self, model: Any, runs: Runs = "language") -> None:
        import torch

        self._model = model
        self._runs = runs
        self._head = model.get_output_embeddings() if runs == "language" else None
        self.layers: Sequence[LayerModules] = layer_modules(model, both=True)
        self._branches = CutBranches(self.layers)
        ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
        stacked = model.config.is_encoder_decoder
        by_tokens = model.main_input_name == "input_ids" and not stacked
        with self._branches.counted():
            run_backbone(model, {"input_ids": ids} if by_tokens else probe_inputs(model))

    def record(
        self, inputs: dict[str, torch.Tensor], places: Places, cut: BranchReplacements
    ) -> tuple[Streams, torch.Tensor]:
        """Runs the whole model.

        What later runs can begin from, and the logits, ``[..., vocabulary]``, where they were
        asked for; without a head what was asked; of all of the model its logits.
        """
        streams = Streams(inputs, dict(cut), [None] * len(self.layers), {})
        with contextlib.ExitStack() as stack:
            # First, so that what is kept is what the cut gave.
            stack.enter_context(self._branches.cut(cut))
            for modules in self.layers:
                stack.enter_context(recorded(modules, streams))
            return streams, self._run(inputs, places, stack)

    def resume(self, streams: Streams, places: Places, cut: BranchReplacements) -> torch.Tensor:
        """Runs only what a cut changes against the recorded run."""
        start, output = self._start(streams, cut)
        with contextlib.ExitStack() as stack:
            for modules in self.layers[:start]:
                kept = streams.outputs[modules.number]
                if modules.number == start - 1 and output is not None:
                    kept = output
                stack.enter_context(forward_of(modules.layer, giving(kept)))
            rest = {name: what for name, what in cut.items() if name[0] >= start}
            stack.enter_context(self._branches.cut(rest))
            return self._run(streams.inputs, places, stack)

    def _start(self, streams: Streams, cut: BranchReplacements) -> tuple[int, Any]:
        """The first layer to run, and what the one below gives now; None: what it gave before."""
        changed = sorted(
            name for name in {*cut, *streams.cut} if cut.get(name) is not streams.cut.get(name)
        )
        if not changed:
            return len(self.layers), None
        layer, _ = changed[0]
        mlp = cut.get(SublayerRef(layer, "mlp"))
        same = SublayerRef(layer, "attention") not in changed and layer in streams.attended
        if not same or mlp is None or mlp.weight is not None:
            return layer, None
        return layer + 1, without_mlp(streams.attended[layer], mlp, streams.outputs[layer])

    def _run(
        self, inputs: dict[str, torch.Tensor], places: Places, stack: contextlib.ExitStack
    ) -> torch.Tensor:
        import torch

        if self._runs == "all":
            with torch.inference_mode():
                return class_logits(self._model, inputs)
        if self._head is None:
            states = run_backbone(self._model, inputs).last_hidden_state
            with torch.inference_mode():
                return places(states)
        stack.enter_context(head_at(self._head, places))
        with torch.inference_mode():
            given = in_own_dtype(self._model, inputs)
            logits: torch.Tensor = self._model(**given, use_cache=False).logits
        return logits


def head_at(head: torch.nn.Module, places: Places) -> contextlib.AbstractContextManager[None]:
    """Runs a model's head at some places only while the block runs."""

    def choose(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (places(args[0]), *args[1:])

    return hooked([head.register_forward_pre_hook(choose)])


class CutBranches:
    """The branches of some layers, and what goes in their places."""

    def __init__(self, layers: Sequence[LayerModules]) -> None:
        self._parts = {part.ref: part for part in sublayers_of(layers)}
        self._returned: dict[SublayerRef, int] = {}

    def counted(self, layer: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Notes how many things the module of each branch of a layer, or of all, returns."""

        def keep(name: SublayerRef) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                self._returned[name] = len(output) if isinstance(output, tuple) else 0

            return hook

        return hooked(
            part.contribution.register_forward_hook(keep(name))
            for name, part in self._parts.items()
            if layer in (None, part.layer)
        )

    @contextlib.contextmanager
    def cut(self, cut: BranchReplacements) -> Iterator[None]:
        """Puts replacements in branches' places; a branch that is a single module does not run."""
        with contextlib.ExitStack() as stack:
            for name, replacement in cut.items():
                stack.enter_context(self._replaced(name, replacement))
            yield

    def _replaced(
        self, name: SublayerRef, replacement: BranchReplacement
    ) -> contextlib.AbstractContextManager[None]:
        part = self._parts[name]
        if part.reads is not part.contribution:
            return hooked(replacing_hooks(part, replacement))
        count = self._returned[name]

        def instead(*args: Any, **kwargs: Any) -> Any:
            x = first_input(args, kwargs)
            contribution = replacement.contribution(x)
            new = x.new_zeros(x.shape) if contribution is None else contribution / part.multiplier
            return (new, *[None] * (count - 1)) if count else new

        return forward_of(part.contribution, instead)


def without_mlp(attended: torch.Tensor, replacement: BranchReplacement, output: Any) -> Any:
    """What a sequential layer returns without its MLP, known without running it.

    attended: the stream between attention and MLP, `[batch, tokens, hidden]`.
    """
    bias = replacement.bias
    stream = attended if bias is None else attended + bias.to(attended)
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def recorded(modules: LayerModules, streams: Streams) -> contextlib.AbstractContextManager[None]:
    """Keeps what a layer returns in the block, and the stream between its two branches."""
    number = modules.number
    stream: list[torch.Tensor] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream[:] = [first_input(args, kwargs)]

    def between(_module: Any, _inputs: Any, output: Any) -> None:
        branch = first_tensor(output).reshape(stream[0].shape)
        streams.attended[number] = stream[0] + branch * modules.multiplier

    def leave(_module: Any, _inputs: Any, output: Any) -> None:
        streams.outputs[number] = output

    def hooks() -> Iterator[Any]:
        yield modules.layer.register_forward_pre_hook(enter, with_kwargs=True)
        yield modules.layer.register_forward_hook(leave)
        if modules.form == "sequential" and modules.cross_attention is None:
            yield modules.attention.register_forward_hook(between)

    return hooked(hooks())


@contextlib.contextmanager
def forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module another forward while the block runs."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def giving(output: Any) -> Callable[..., Any]:
    """A forward that returns what is already known."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output

    return forward


class LayerRunner:
    """A model of which one layer at a time has its weights."""

    def __init__(self, model: Any, layers: Sequence[LayerModules]) -> None:
        self._model, self._layers = model, layers
        self._returned = 0  # how many things a layer returns; 0 for a bare tensor
        self._now: Any = None

    @contextlib.contextmanager
    def only(self, number: int | None) -> Iterator[None]:
        """Runs that layer alone while the block runs; None: no layer at all."""
        with contextlib.ExitStack() as stack:
            for modules in self._layers:
                if modules.number == number:
                    handle = modules.layer.register_forward_hook(self._keep)
                    stack.callback(handle.remove)
                else:
                    stack.enter_context(forward_of(modules.layer, self._hand_out))
            yield

    def run(self, inputs: dict[str, torch.Tensor], given: torch.Tensor | None) -> torch.Tensor:
        """Runs the layer that :meth:`only` names.

        What the layer gives, ``[batch, tokens, hidden]``.

        given: what the layer below gave, `[batch, tokens, hidden]`; None for the first.
        """
        self._give(given)
        run_backbone(self._model, inputs)
        output = first_tensor(self._now)
        self._now = None
        return output

    def logits(self, inputs: dict[str, torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        """What the model's head makes of the last layer's output; within ``only(None)``."""
        import torch

        self._give(given)
        with torch.inference_mode():
            logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
        self._now = None
        return logits

    @contextlib.contextmanager
    def without_embedding(self) -> Iterator[None]:
        """Lets the input embedding hand out zeros while the block runs, so that it can go.

        Only the first layer reads what it gives; behind it, the tensor's form is all that counts.
        """
        import torch

        embedding = self._model.get_input_embeddings()
        dtype, width = embedding.weight.dtype, embedding.weight.shape[-1]

        def zeros(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros((), dtype=dtype, device=ids.device).expand(*ids.shape, width)

        with forward_of(embedding, zeros):
            yield

    def _give(self, given: torch.Tensor | None) -> None:
        self._now = (given, *[None] * (self._returned - 1)) if self._returned else given

    def _hand_out(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._now

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._returned = len(output) if isinstance(output, tuple) else 0
        self._now = output
