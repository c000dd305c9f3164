"""Runs a model once, and then only from the layer on in which a cut differs from the first.

Skipping a branch of layer ``l`` leaves the layers below as they were: their outputs are taken from
the first run. No knowledge of a family's way of calling its layers is needed: the model's own
forward runs, with the layers below handing out what they gave before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.models.ablation.branch_replacements import (
    BranchReplacement,
    BranchReplacements,
    first_input,
    hooked,
)
from exporter.models.anatomy.architectures import SublayerModules, layer_modules, sublayers
from exporter.models.anatomy.residual_stream import LayerModules, first_tensor
from graph_passes.types import SublayerRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Streams:
    """What one run of some samples left behind, for runs that begin higher up.

    Attributes:
        inputs: What the model was given.
        cut: What was cut in this run.
        outputs: Of each layer, what it returned.
        attended: Of each sequential layer, the stream between attention and MLP,
            ``[batch, tokens, hidden]``; empty for layers of other forms.
    """

    inputs: dict[str, torch.Tensor]
    cut: BranchReplacements
    outputs: list[Any]
    attended: dict[int, torch.Tensor]


class StreamRunner:
    """A model that runs whole or from some layer on, with branches cut.

    Args:
        model: A transformers model with a language head.
        positions: Every so many positions the head is run; 1 for all.

    Raises:
        UnknownArchitectureError: When it is not known where the model keeps its sublayers.
    """

    def __init__(self, model: Any, positions: int = 1) -> None:
        self._model = model
        self._head = model.get_output_embeddings()
        self._stride = positions
        self.layers: Sequence[LayerModules] = layer_modules(model)
        self._parts: dict[SublayerRef, SublayerModules] = {
            part.ref: part for part in sublayers(model)
        }
        self._returned: dict[SublayerRef, int] = {}
        self._learn_outputs()

    def record(
        self, inputs: dict[str, torch.Tensor], cut: BranchReplacements
    ) -> tuple[Streams, torch.Tensor]:
        """Runs the whole model.

        Returns:
            What later runs can begin from, and the logits ``[batch, chosen positions, vocabulary]``
            at every so many positions, the first included.
        """
        streams = Streams(inputs, dict(cut), [None] * len(self.layers), {})
        with contextlib.ExitStack() as stack:
            self._enter_cut(cut, stack)  # first, so that what is kept is what the cut gave
            for modules in self.layers:
                stack.enter_context(recorded(modules, streams))
            return streams, self._run(inputs, stack)

    def resume(self, streams: Streams, cut: BranchReplacements) -> torch.Tensor:
        """Runs only what a cut changes against the recorded run.

        Returns:
            The logits, as :meth:`record` gives them.
        """
        start, output = self._start(streams, cut)
        with contextlib.ExitStack() as stack:
            for modules in self.layers[:start]:
                kept = streams.outputs[modules.number]
                if modules.number == start - 1 and output is not None:
                    kept = output
                stack.enter_context(forward_of(modules.layer, giving(kept)))
            rest = {name: what for name, what in cut.items() if name[0] >= start}
            self._enter_cut(rest, stack)
            return self._run(streams.inputs, stack)

    def _start(self, streams: Streams, cut: BranchReplacements) -> tuple[int, Any]:
        """The first layer to run, and what the one below gives now; None: what it gave before."""
        changed = sorted(
            name for name in {*cut, *streams.cut} if cut.get(name) is not streams.cut.get(name)
        )
        if not changed:
            return len(self.layers), None
        layer, _ = changed[0]
        mlp = cut.get(SublayerRef(layer, "mlp"))
        same_attention = SublayerRef(layer, "attention") not in changed
        if not same_attention or mlp is None or mlp.maps or layer not in streams.attended:
            return layer, None
        return layer + 1, without_mlp(streams.attended[layer], mlp, streams.outputs[layer])

    def _enter_cut(self, cut: BranchReplacements, stack: contextlib.ExitStack) -> None:
        for name, replacement in cut.items():
            stack.enter_context(branch_cut(self._parts[name], replacement, self._returned[name]))

    def _run(self, inputs: dict[str, torch.Tensor], stack: contextlib.ExitStack) -> torch.Tensor:
        import torch

        stack.enter_context(strided_head(self._head, self._stride))
        with torch.inference_mode():
            logits: torch.Tensor = self._model(**inputs, use_cache=False).logits
        return logits

    def _learn_outputs(self) -> None:
        import torch

        ids = torch.zeros((1, 2), dtype=torch.int64, device=self._model.device)
        with counting_outputs(self._parts, self._returned), torch.inference_mode():
            self._model(input_ids=ids, use_cache=False)


@contextlib.contextmanager
def strided_head(head: torch.nn.Module, positions: int) -> Iterator[None]:
    """Runs a model's head at every so many positions while the block runs."""

    def choose(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, ::positions], *args[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def counting_outputs(
    parts: Mapping[SublayerRef, SublayerModules], counts: dict[SublayerRef, int]
) -> Iterator[None]:
    """Notes how many things each branch's module returns in the block; 0 for a bare tensor."""

    def keep(name: SublayerRef) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            counts[name] = len(output) if isinstance(output, tuple) else 0

        return hook

    with contextlib.ExitStack() as hooks:
        for name, part in parts.items():
            handle = part.contribution.register_forward_hook(keep(name))
            hooks.callback(handle.remove)
        yield


@contextlib.contextmanager
def branch_cut(part: SublayerModules, replacement: BranchReplacement, count: int) -> Iterator[None]:
    """Puts a replacement in a branch's place; one that is a single module does not run.

    Args:
        part: The branch.
        replacement: What it contributes instead.
        count: How many things its module returns; 0 for a bare tensor.
    """
    if part.reads is not part.contribution:
        with contextlib.ExitStack() as hooks:
            for handle in hooked(part, replacement):
                hooks.callback(handle.remove)
            yield
        return

    def instead(*args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        contribution = replacement.contribution(x)
        new = x.new_zeros(x.shape) if contribution is None else contribution / part.multiplier
        return (new, *[None] * (count - 1)) if count else new

    with forward_of(part.contribution, instead):
        yield


def without_mlp(attended: torch.Tensor, replacement: BranchReplacement, output: Any) -> Any:
    """What a sequential layer returns without its MLP, known without running it.

    Args:
        attended: The stream between attention and MLP, ``[batch, tokens, hidden]``.
        replacement: What is in the MLP's place: nothing, or a bias.
        output: What the whole layer returned.
    """
    bias = replacement.bias
    stream = attended if bias is None else attended + bias.to(attended)
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


@contextlib.contextmanager
def recorded(modules: LayerModules, streams: Streams) -> Iterator[None]:
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

    with contextlib.ExitStack() as hooks:
        handles = [
            modules.layer.register_forward_pre_hook(enter, with_kwargs=True),
            modules.layer.register_forward_hook(leave),
        ]
        if modules.form == "sequential":
            handles.append(modules.attention.register_forward_hook(between))
        for handle in handles:
            hooks.callback(handle.remove)
        yield


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
